"""The named steps of cleaning, their options, and the profiles, which are lists of steps."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.config import Option, suggestion
from gptjax.data.cleaning import chinese, extraction, filters, normalization, social_media
from gptjax.data.cleaning import lossy as reduction
from gptjax.errors import UserError

_HANDLING = ("keep", "remove", "placeholder")

OPTIONS: dict[str, Option] = {
    "emoji": Option("keep", "emoji and Weibo's [doge] codes", choices=("keep", "remove")),
    "mentions": Option("keep", "names of users: @name, 回复@name:", choices=_HANDLING),
    "urls": Option("keep", "web addresses", choices=_HANDLING),
    "emails": Option("keep", "addresses of e-mail", choices=_HANDLING),
    "laughter": Option("squeeze", "哈哈哈哈 to 哈哈 or to 笑", choices=("squeeze", "word", "keep")),
    "full_width": Option("letters", "full-width forms to ASCII", choices=("letters", "all", "keep")),
    "quotes": Option("curly", "style of quotation marks", choices=("curly", "corner", "ascii", "keep")),
    "max_blank_lines": Option(1, "blank lines in a row", minimum=0, maximum=1000),
    "min_characters": Option(1, "a shorter document is dropped", minimum=0, maximum=10**15),
    "max_characters": Option(0, "a longer document is dropped; 0 = no limit", minimum=0, maximum=10**15),
    "max_symbol_ratio": Option(0.4, "punctuation and symbols / visible characters", minimum=0, maximum=1),
    "max_repeated_line_ratio": Option(0.2, "characters in lines that occurred before / all", minimum=0, maximum=1),
    "max_top_ngram_ratio": Option(
        0.2, "characters of the most frequent 2-gram / all; 0.02 less for each n to 4", minimum=0, maximum=1
    ),
    "max_repeated_ngram_ratio": Option(
        0.15, "characters in repeated 5-grams / all; 0.01 less for each n to 10", minimum=0, maximum=1
    ),
    "languages": Option("", "ISO 639-1 codes that are kept, such as en,zh; empty = all"),
}

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: either a `transform` of the text, or a filter that gives the reason to `reject` the document.

    Attributes:
      transform: (text, options) -> text.
      reject: (text, characters of the document, options) -> reason, empty if the document stays.
      invertible: False if the original text cannot be restored from the result.
    """

    name: str
    transform: Callable[[str, Options], str] | None = None
    reject: Callable[[str, int, Options], str] | None = None
    invertible: bool = True


def _always(name: str, function: Callable[[str], str], *, invertible: bool = True) -> Step:
    return Step(name, transform=lambda text, _: function(text), invertible=invertible)


def _by_option(name: str, function: Callable[[str, str], str]) -> Step:
    def transform(text: str, options: Options) -> str:
        return text if options[name] == "keep" else function(text, options[name])

    return Step(name, transform=transform)


# In the order in which a profile runs them, also with steps added to it.
STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        _always("html", extraction.main_text),
        _always("strip_tags", extraction.strip_tags),
        _always("entities", normalization.entities),
        # Before nfc: removing characters can bring others together that nfc composes.
        _always("control_characters", normalization.control_characters),
        _by_option("full_width", normalization.full_width),
        _by_option("quotes", normalization.quotes),
        _always("lowercase", reduction.lowercase, invertible=False),
        _always("nfc", normalization.nfc),
        _always("nfkc", normalization.nfkc),
        _always("simplified", chinese.simplified),
        _by_option("urls", social_media.urls),
        _by_option("emails", social_media.emails),
        _by_option("mentions", social_media.mentions),
        _by_option("emoji", social_media.emoji),
        _by_option("laughter", social_media.laughter),
        _always("repeated_punctuation", social_media.repeated_punctuation),
        _always("special_characters", reduction.special_characters, invertible=False),
        _always("punctuation", reduction.punctuation, invertible=False),
        _always("segment", reduction.segment, invertible=False),
        _always("stop_words", reduction.stop_words, invertible=False),
        _always("spaces", normalization.spaces),
        _always("indentation", normalization.indentation),
        _always("trailing_whitespace", normalization.trailing_whitespace),
        Step("blank_lines", lambda text, options: normalization.blank_lines(text, options["max_blank_lines"])),
        Step(
            "length",
            reject=lambda _, characters, options: filters.length(
                characters, options["min_characters"], options["max_characters"]
            ),
        ),
        Step("symbols", reject=lambda text, _, options: filters.symbols(text, options["max_symbol_ratio"])),
        Step(
            "repeated_lines",
            reject=lambda text, _, options: filters.repeated_lines(text, options["max_repeated_line_ratio"]),
        ),
        Step(
            "repeated_ngrams",
            reject=lambda text, _, options: filters.repeated_ngrams(
                text, options["max_top_ngram_ratio"], options["max_repeated_ngram_ratio"]
            ),
        ),
        Step("language", reject=lambda text, _, options: filters.language(text, options["languages"])),
    )
}


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: tuple[str, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _profile(steps: str, **options: Any) -> Profile:
    return Profile(tuple(steps.split()), options)


_LAYOUT = "spaces trailing_whitespace blank_lines length"

PROFILES: dict[str, Profile] = {
    "none": _profile(""),
    "plain": _profile(f"control_characters nfc {_LAYOUT}"),
    "web": _profile(
        f"html entities control_characters nfc {_LAYOUT} symbols repeated_lines repeated_ngrams language",
        min_characters=50,
    ),
    # Indentation and alignment stay.
    "code": _profile("control_characters trailing_whitespace blank_lines length", max_blank_lines=2),
    "dialogue": _profile("control_characters nfc trailing_whitespace blank_lines length", max_blank_lines=2),
    "chinese": _profile(
        "entities control_characters full_width quotes nfc urls mentions emoji laughter repeated_punctuation "
        + _LAYOUT,
        urls="remove",
        mentions="remove",
    ),
    # Addresses and names are removed before the punctuation by which they are recognised.
    "guide": _profile(
        "strip_tags control_characters lowercase nfc urls emails mentions laughter special_characters punctuation "
        + f"segment stop_words indentation {_LAYOUT}",
        urls="remove",
        emails="remove",
        mentions="remove",
        laughter="word",
    ),
}


def parse_profile(spec: str, options: Mapping[str, Any] | None = None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The steps, in order, and all options of a spec.

    Args:
      spec: a profile ("web"), a profile with steps added or removed ("web-language+emoji"; they run in the order
        of `STEPS`), or steps with commas, which run in this order ("nfc,spaces").
      options: values for `OPTIONS`; None means the profile's own value.

    Raises:
      UserError: an unknown profile, step or option, or a value out of its range.
    """
    first, *edits = re.split("([+-])", spec.strip())
    if first in PROFILES:
        profile = PROFILES[first]
        steps = list(profile.steps)
        for sign, name in zip(edits[::2], edits[1::2], strict=True):
            _check_step(name, spec)
            steps = [step for step in steps if step != name] + ([name] if sign == "+" else [])
        if edits:
            steps.sort(key=list(STEPS).index)
    else:
        profile = Profile(())
        steps = [name.strip() for name in spec.split(",")]
        for name in steps:
            _check_step(name, spec)
    return tuple(steps), _resolve(profile, options or {})


def _check_step(name: str, spec: str) -> None:
    if name in PROFILES:
        raise UserError(
            f"cleaning {spec!r}: {name!r} is a profile, which comes first and alone; steps are added and left out with "
            f"+ and -, such as {name}+emoji-quotes"
        )
    if name not in STEPS:
        raise UserError(
            f"cleaning {spec!r}: {name!r} is neither a profile ({', '.join(PROFILES)}) nor a step "
            f"({', '.join(STEPS)}){suggestion(name, [*PROFILES, *STEPS])}"
        )


def _resolve(profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: option.default for name, option in OPTIONS.items()} | dict(profile.options)
    for name, value in given.items():
        if name not in OPTIONS:
            raise UserError(
                f"unknown cleaning option {name!r}: expected one of {', '.join(OPTIONS)}{suggestion(name, OPTIONS)}"
            )
        if value is not None:
            options[name] = _checked(name, value, OPTIONS[name])
    languages = options["languages"]
    names = languages.split(",") if isinstance(languages, str) else languages
    options["languages"] = tuple(name.strip().lower() for name in names if name.strip())
    return options


def _checked(name: str, value: Any, option: Option) -> Any:
    if option.choices:
        if value not in option.choices:
            raise UserError(f"cleaning option {name}={value!r}: expected one of {', '.join(option.choices)}")
    elif name == "languages":
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, str | list | tuple) or not all(
            isinstance(code, str) and re.fullmatch(r"\s*([A-Za-z]{2,3})?\s*", code) for code in names
        ):
            raise UserError(f"cleaning option languages={value!r}: expected ISO 639-1 codes such as 'en,zh'")
    else:
        whole = isinstance(option.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise UserError(f"cleaning option {name}={value!r}: expected a {'whole ' if whole else ''}number")
        if not option.minimum <= value <= (option.maximum if option.maximum is not None else value):
            most = f" to {option.maximum}" if option.maximum is not None else " or more"
            raise UserError(f"cleaning option {name}={value!r}: expected {option.minimum}{most}")
    return value

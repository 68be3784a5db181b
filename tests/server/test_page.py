"""The page in a browser: headless Chromium, the system's or that of `playwright install chromium`."""

import json
import shutil
from pathlib import Path

import pytest

from gptjax.data.sources.opening import open_source
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.server.models import Models

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.slow
SCRIPT = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


@pytest.fixture(scope="module")
def two_models(make_served):
    """Two that chat, and one that does not."""
    names = {"chat": ChatTemplate(), "other": ChatTemplate(), "text": None}
    models = Models([make_served(name, template) for name, template in names.items()])
    for model in models:
        model.start(warm_up=False)
    yield models
    for model in models:
        model.close(0)


@pytest.fixture
def page(live, two_models, tmp_path):
    """An open page, which fails if a request leaves the origin or a script raises."""
    address = live(two_models, preferences=tmp_path / "choices.jsonl")
    wrong = []
    with playwright.sync_playwright() as driver:
        path = CHROMIUM or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(f"there is no Chromium in the PATH, and none of Playwright's at {path}")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_context(locale="en-US").new_page()
        page.on("request", lambda request: request.url.startswith(address) or wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_selector("#model option >> nth=1", state="attached")
        page.fill_settings = lambda **values: _fill_settings(page, values)
        yield page
        browser.close()
    assert not wrong


def _fill_settings(page, values):
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
        page.dispatch_event(f"#{name}", "change")
    page.click("#open-settings")


def ask(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def wait_for_answer(page):
    page.wait_for_selector(".assistant .tools")
    page.wait_for_selector("#stop", state="hidden")


def test_a_conversation_is_streamed_kept_edited_and_told_again(page):
    page.fill_settings(max_tokens=20, seed=1, temperature=1)
    ask(page, SCRIPT)
    wait_for_answer(page)
    assert page.inner_text(".user .body") == SCRIPT, "what is typed is text"
    assert page.title().endswith("· gptjax") and page.title() != "run"
    first = page.inner_text(".assistant .body")
    page.click(".assistant button:has-text('Regenerate')")
    page.wait_for_selector("text=2 / 2")
    assert page.inner_text(".assistant .body") != first
    page.click("[aria-label='Previous version']")
    assert page.inner_text(".assistant .body") == first
    page.click(".user button:has-text('Edit')")
    page.fill(".user textarea", "another question")
    page.press(".user textarea", "Enter")
    page.wait_for_selector(".user >> text=2 / 2")
    wait_for_answer(page)
    page.reload()
    page.wait_for_selector(".assistant")
    assert page.inner_text(".user .body") == "another question"
    assert page.locator("#conversations li").count() == 1


def test_an_answer_made_of_markup_is_text(page):
    page.wait_for_selector(".empty")
    shown = page.evaluate(
        """async (text) => {
            const { markdown } = await import('/markdown.js');
            const box = document.createElement('div');
            box.append(markdown(text));
            document.body.append(box);
            await new Promise((done) => setTimeout(done, 200));
            return [box.textContent, box.querySelectorAll('script, img, iframe').length, document.title];
        }""",
        f"**bold** {SCRIPT} [x](javascript:alert(1)) [y](https://example.org)",
    )
    assert SCRIPT in shown[0] and shown[1] == 0 and shown[2] == "gptjax"
    assert page.locator("a").evaluate_all("links => links.map(link => link.href)") == ["https://example.org/"]


def test_stop_keeps_what_was_written(page):
    page.fill_settings(max_tokens=110, seed=3)
    page.evaluate("""() => {
        const read = ReadableStreamDefaultReader.prototype.read;
        ReadableStreamDefaultReader.prototype.read = async function (...rest) {
            const result = await read.apply(this, rest);
            if (result.done) await new Promise(() => {});  // the end never comes
            return result;
        };
    }""")
    ask(page, "go on")
    page.wait_for_selector(".writing :text-matches('...')")
    page.keyboard.press("Escape")
    wait_for_answer(page)
    assert page.locator("#send").is_visible()


def test_the_better_of_two_answers_becomes_a_preference_that_can_be_read(page, tmp_path):
    page.fill_settings(max_tokens=12, temperature=1)
    page.check("#compare")
    ask(page, "which?")
    page.wait_for_selector(".choose >> nth=1")
    page.locator(".choose").nth(1).click()
    page.wait_for_selector("text=Your choice was recorded.")
    (record,) = map(json.loads, (tmp_path / "choices.jsonl").read_text("utf-8").splitlines())
    assert record["models"] == ["other", "chat"]
    assert record["prompt"] == [{"role": "user", "content": "which?"}]
    (document,) = open_source(f"preference:{tmp_path / 'choices.jsonl'}").documents()
    assert document["messages"][-1]["content"] == record["chosen"][0]["content"]
    assert document["rejected"][-1]["content"] == record["rejected"][0]["content"]


def test_everything_is_reached_by_keyboard_on_a_phone_and_in_chinese(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#open-side")
    page.click("#language")
    page.keyboard.press("Escape")
    assert page.inner_text("#send") == "发送"
    names = []
    page.keyboard.press("Tab")
    for _ in range(12):
        names.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"model", "compare", "open-settings", "input"} <= set(names)

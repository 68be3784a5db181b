// A small, safe part of Markdown: the model's text becomes text nodes in known elements, never markup.
// No pictures, and links only to http and https, so that no text of a model makes the page load from another server.

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]+?)\*\*|\*(?=\S)([^*]+?)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

export function markdown(text) {
  const root = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^\s*(```+|~~~+)\s*(\S*)/);
    if (fence) {
      const code = [];
      for (at += 1; at < lines.length && !lines[at].trim().startsWith(fence[1]); at += 1) code.push(lines[at]);
      at += 1;
      const pre = make("pre");
      pre.append(make("code", code.join("\n")));
      root.append(pre);
    } else if (/^#{1,6}\s/.test(line)) {
      const level = line.match(/^#+/)[0].length;
      root.append(inline(make(`h${Math.min(level + 2, 6)}`), line.replace(/^#+\s+/, "")));
      at += 1;
    } else if (/^\s*([-*+]|\d+[.)])\s+/.test(line)) {
      const list = make(/^\s*\d/.test(line) ? "ol" : "ul");
      const number = line.match(/^\s*(\d+)/);
      if (number) list.start = Number(number[1]);
      while (at < lines.length && /^\s*([-*+]|\d+[.)])\s+/.test(lines[at])) {
        list.append(inline(make("li"), lines[at].replace(/^\s*([-*+]|\d+[.)])\s+/, "")));
        at += 1;
      }
      root.append(list);
    } else if (/^\s*>/.test(line)) {
      const quoted = [];
      for (; at < lines.length && /^\s*>/.test(lines[at]); at += 1) quoted.push(lines[at].replace(/^\s*>\s?/, ""));
      root.append(inline(make("blockquote"), quoted.join("\n")));
    } else if (!line.trim()) {
      at += 1;
    } else {
      const words = [];
      const ends = (next) => !next.trim() || /^\s*(```|~~~|#{1,6}\s|>|([-*+]|\d+[.)])\s)/.test(next);
      for (; at < lines.length && !(words.length && ends(lines[at])); at += 1) words.push(lines[at]);
      root.append(inline(make("p"), words.join("\n")));
    }
  }
  return root;
}

function inline(parent, text) {
  let rest = text;
  for (let found = rest.match(INLINE); found; found = rest.match(INLINE)) {
    if (found.index) parent.append(rest.slice(0, found.index));
    if (found[1]) parent.append(make("code", found[2].trim()));
    else if (found[3]) parent.append(inline(make("strong"), found[3]));
    else if (found[4]) parent.append(inline(make("em"), found[4]));
    else {
      const link = make("a", found[5]);
      link.href = found[6];
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      parent.append(link);
    }
    rest = rest.slice(found.index + found[0].length);
  }
  if (rest) parent.append(rest);
  return parent;
}

function make(name, text) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  return element;
}

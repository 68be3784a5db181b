// Conversations, stored in this browser. Each is a tree: other versions of a message are its siblings.

const NAME = "conversations";

export class Store {
  constructor() {
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(NAME));
    } catch {
      kept = null; // written by something else
    }
    this.all = Array.isArray(kept) ? kept.filter((one) => one && one.id && one.nodes) : [];
    this.current = this.all[0] || this.create();
  }

  create() {
    this.current = { id: crypto.randomUUID(), title: "", system: "", nodes: {}, leaf: null, count: 0 };
    return this.current;
  }

  // Stores the current conversation, first in the list; drops the oldest ones if the browser has no room.
  save() {
    const begun = this.current.count > 0;
    this.all = [...(begun ? [this.current] : []), ...this.all.filter((one) => one.id !== this.current.id)];
    for (;;) {
      try {
        localStorage.setItem(NAME, JSON.stringify(this.all));
        return;
      } catch (error) {
        if (this.all.length < 2) throw error;
        this.all.pop();
      }
    }
  }

  open(id) {
    this.current = this.all.find((one) => one.id === id) || this.create();
  }

  remove(id) {
    this.all = this.all.filter((one) => one.id !== id);
    localStorage.setItem(NAME, JSON.stringify(this.all));
    if (this.current.id === id) this.current = this.all[0] || this.create();
  }

  // Adds a message after `parent` (null: the first) and shows it.
  add(parent, role, content, more = {}) {
    const one = this.current;
    const node = { id: one.count, parent, role, content, ...more };
    one.nodes[node.id] = node;
    one.count += 1;
    one.leaf = node.id;
    if (!one.title && role === "user") one.title = content.trim().slice(0, 60);
    return node;
  }

  // The messages from the first to `leaf`.
  path(leaf = this.current.leaf) {
    const found = [];
    for (let id = leaf; id !== null; id = this.current.nodes[id].parent) found.unshift(this.current.nodes[id]);
    return found;
  }

  // The message and its other versions, in the order in which they were made.
  sisters(node) {
    return Object.values(this.current.nodes).filter((one) => one.parent === node.parent && one.role === node.role);
  }

  // Shows this version, and below it the newest messages.
  show(node) {
    let last = node;
    for (;;) {
      const next = Object.values(this.current.nodes).filter((one) => one.parent === last.id).pop();
      if (!next) break;
      last = next;
    }
    this.current.leaf = last.id;
  }
}

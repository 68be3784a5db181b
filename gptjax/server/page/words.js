// The texts of the page, in English and Chinese.

const WORDS = {
  en: {
    new: "New conversation", theme: "Light / dark", compare: "Compare two", settings: "Settings", key: "API key",
    system: "System prompt", send: "Send", stop: "Stop", ask: "Ask something", model: "Model", second: "Second model",
    hint: "Enter sends, Shift+Enter begins a new line, Esc stops, ↑ in the empty box edits the last message.",
    conversations: "Conversations", close: "Close", delete: "Delete", copy: "Copy", edit: "Edit", save: "Send again",
    cancel: "Cancel", regenerate: "Regenerate", previous: "Previous version", next: "Next version",
    tokens: "Tokens", better: "This one is better", recorded: "Your choice was recorded.", speed: "tokens/s",
    length: "stopped at the token limit", stopped: "stopped", untitled: "Untitled",
    confirm: "Delete this conversation?", broken: "The connection ended before the answer was complete.",
    empty: "What would you like to ask?", you: "You", language: "中文",
  },
  zh: {
    new: "新对话", theme: "浅色／深色", compare: "对比两个模型", settings: "设置", key: "API 密钥",
    system: "系统提示", send: "发送", stop: "停止", ask: "说点什么", model: "模型", second: "第二个模型",
    hint: "回车发送，Shift+回车换行，Esc 停止；输入框为空时按 ↑ 修改上一条消息。",
    conversations: "对话列表", close: "关闭", delete: "删除", copy: "复制", edit: "修改", save: "重新发送",
    cancel: "取消", regenerate: "重新生成", previous: "上一个版本", next: "下一个版本",
    tokens: "词元", better: "这个更好", recorded: "已记录你的选择。", speed: "词元/秒",
    length: "达到长度上限", stopped: "已停止", untitled: "未命名",
    confirm: "删除这个对话？", broken: "回答未完成，连接中断。",
    empty: "想问些什么？", you: "你", language: "English",
  },
};

let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");

export function word(name) {
  return WORDS[language][name];
}

export function otherLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  speak();
}

// Writes the words of the language into the elements that name them.
export function speak() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = word(element.dataset.placeholder);
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", word(element.dataset.label));
    element.title = word(element.dataset.label);
  }
  document.getElementById("language").textContent = word("language");
}

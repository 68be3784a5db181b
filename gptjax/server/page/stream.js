// The server's API: the list of models, and an answer that arrives piece by piece.

export class ServerError extends Error {}

function headers(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function refusal(response) {
  try {
    return new ServerError((await response.json()).error.message);
  } catch {
    return new ServerError(`${response.status} ${response.statusText}`);
  }
}

export async function models(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  const chatting = (await response.json()).data.filter((model) => model.chat !== false);
  if (!chatting.length) throw new ServerError("No model here has a chat template.");
  return chatting.map((model) => model.id);
}

// Tells the server which of two answers is better. Throws ServerError.
export async function prefer(record, key) {
  const request = { method: "POST", headers: headers(key), body: JSON.stringify(record) };
  const response = await fetch("preferences", request);
  if (!response.ok) throw await refusal(response);
}

// Yields {text, tokens: [[text, log-probability]], reason, usage} as they arrive. Throws ServerError.
export async function* answer(request, { key, signal }) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true }, logprobs: true });
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw await refusal(response);
  let whole = false;
  for await (const data of frames(response.body)) {
    if (data === "[DONE]") {
      whole = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message);
    const choice = event.choices[0] || {};
    yield {
      text: choice.delta?.content || "",
      tokens: (choice.logprobs?.content || []).map((token) => [token.token, token.logprob]),
      reason: choice.finish_reason || null,
      usage: event.usage || null,
    };
  }
  if (!whole) throw new ServerError("");
}

// The data of server-sent events. One decoder for the whole stream: a character may be cut between two reads.
async function* frames(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    buffer += decoder.decode(value || new Uint8Array(), { stream: !done });
    const parts = buffer.split(/\r?\n\r?\n/);
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
    if (done) return;
  }
}

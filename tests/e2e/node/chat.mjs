// Drives the official npm client: one answer, one stream, one error; prints what it saw as JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];

const plain = await client.chat.completions.create({ model, messages, temperature: 0 });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
let bad = {};
try {
  await client.chat.completions.create({ model, messages, temperature: 9 });
} catch (error) {
  bad = { status: error.status, param: error.param };
}
console.log(JSON.stringify({
  plain: plain.choices[0].message.content, streamed, badStatus: bad.status, badParam: bad.param,
}));

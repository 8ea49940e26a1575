// Reads a webhook from stdin and asks the `standardwebhooks` package what it thinks of it:
// with each of its secrets, and of the same one spoiled in three ways.
import { readFileSync } from "node:fs";
import { Webhook } from "standardwebhooks";

const { headers, body, secrets } = JSON.parse(readFileSync(0, "utf8"));
const types = secrets.map((secret) => new Webhook(secret).verify(body, headers).type);

const stranger = "whsec_" + Buffer.from("of somebody else, 24 b.").toString("base64");
const spoiled = [
  [secrets[0], body + " ", headers],
  [secrets[0], body, { ...headers, "webhook-id": "msg_other" }],
  [stranger, body, headers],
];
let refused = 0;
for (const [secret, text, sent] of spoiled) {
  try {
    new Webhook(secret).verify(text, sent);
  } catch {
    refused += 1;
  }
}
console.log(JSON.stringify({ types, refused }));

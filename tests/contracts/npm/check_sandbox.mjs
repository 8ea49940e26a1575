// Runs the official JavaScript client, unchanged, against the sandbox named by the first
// argument (its /v1 address), and prints what it saw as one JSON object.
import Replicate, { validateWebhook } from "replicate";

const MODEL = "black-forest-labs/flux-schnell";
const baseUrl = process.argv[2];
const replicate = new Replicate({ auth: "r8_test", baseUrl });
const seen = {};

const created = await replicate.predictions.create({
  model: MODEL,
  input: { prompt: "a teal lake", seed: 7, num_outputs: 2 },
});
seen.created = created.status;
const finished = await replicate.wait(created, { interval: 50 });
seen.finished = finished.status;
seen.outputs = finished.output.length;

const ran = await replicate.run(MODEL, {
  input: { prompt: "a teal lake", seed: 7 },
  wait: { mode: "block", timeout: 30 },
});
// Only https: and data: outputs become a FileOutput; the sandbox's are plain http.
seen.ranType = typeof ran[0];
const picture = await (await fetch(ran[0])).arrayBuffer();
seen.magic = Buffer.from(picture).subarray(8, 12).toString();

const faults = baseUrl.replace(/\/v1$/, "/sandbox/faults");
await fetch(faults, {
  method: "PUT",
  body: JSON.stringify([{ fault: "create.inline_outputs" }]),
});
const [file] = await replicate.run(MODEL, { input: { prompt: "a lake" } });
const inline = Buffer.from(await (await file.blob()).arrayBuffer());
seen.inline = [file.constructor.name, inline.subarray(8, 12).toString()];
await fetch(faults, { method: "DELETE" });

const version = (await replicate.models.get("black-forest-labs", "flux-schnell"))
  .latest_version.id;
const byVersion = await replicate.run(`${MODEL}:${version}`, {
  input: { prompt: "a red fox" },
  wait: { mode: "poll", interval: 50 },
});
seen.byVersion = byVersion.length;

seen.listed = 0;
for await (const batch of replicate.paginate(replicate.predictions.list)) {
  seen.listed += batch.length;
}

const models = await replicate.models.list();
seen.models = models.results.length;
const versions = await replicate.models.versions.list("black-forest-labs", "flux-schnell");
seen.versions = (versions.results ?? versions).length;
seen.account = (await replicate.accounts.current()).username;
seen.hardware = (await replicate.hardware.list()).length;

const upload = await replicate.files.create(Buffer.from("GIF89a"), { of: "a fox" });
seen.file = (await replicate.files.get(upload.id)).size;
seen.fileDeleted = await replicate.files.delete(upload.id);

const slow = await replicate.predictions.create({
  model: "google/nano-banana-2",
  input: { prompt: "slow" },
});
seen.cancelled = (await replicate.predictions.cancel(slow.id)).status;

try {
  await replicate.predictions.create({ model: MODEL, input: { num_outputs: 9 } });
} catch (error) {
  seen.badInput = { status: error.response?.status, message: error.message };
}

const { key: secret } = await replicate.webhooks.default.secret.get();
const [id, timestamp, signature, body] = process.argv.slice(3);
seen.webhookValid = await validateWebhook({ id, timestamp, signature, body, secret });
seen.forgedValid = await validateWebhook({
  id,
  timestamp,
  signature,
  body: `${body} `,
  secret,
});

console.log(JSON.stringify(seen));

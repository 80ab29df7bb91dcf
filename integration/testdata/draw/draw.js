'use strict';
// Draws random numbers of every kind when asked to: for integration/random_test.go.
//
// usage: draw.js [sdk]
const crac = process.argv[2] === 'sdk' ? require('@crac-shim/crac') : null;
const crypto = require('crypto');
const { randomBytes } = crypto;
const fs = require('fs');
const { setTimeout: sleep } = require('timers/promises');
const { promisify } = require('util');

const kinds = {
  randomBytes: () => randomBytes(16).toString('hex'),
  'randomBytes in the thread pool': async () => (await promisify(randomBytes)(16)).toString('hex'),
  randomUUID: () => crypto.randomUUID(),
  randomInt: () => crypto.randomInt(2 ** 47),
  getRandomValues: () => Buffer.from(crypto.webcrypto.getRandomValues(new Uint8Array(16))).toString('hex'),
  'Math.random': () => Math.random(),
  // Not as JWK: Node 18 holds a lock of the pair meanwhile, and a garbage collection then, which ends
  // the pair, waits for it for ever (node::crypto::ExportJWKEdKey, ~KeyGenJob).
  key: () => crypto.generateKeyPairSync('ed25519').publicKey.export({ format: 'der', type: 'spki' }).subarray(-32).toString('base64url'),
};

async function draw() {
  for (const [kind, one] of Object.entries(kinds)) {
    for (let i = 0; i < 64; i++) console.log('drew', kind.replaceAll(' ', '-'), await one());
  }
}

async function run(command) {
  switch (command) {
    case 'draw':
      return draw();
    case 'env':
      return console.log('env', process.env.CRAC_TEST_CLONE);
    case 'checkpoint':
      return crac.checkpoint().then((outcome) => console.log('outcome', outcome), (err) => console.log('error', err.message));
  }
}

(async () => {
  await draw(); // every generator has a state by now
  console.log('ready');
  for (;;) {
    await sleep(50);
    try {
      fs.renameSync('/ask', '/asked');
    } catch {
      continue;
    }
    await run(fs.readFileSync('/asked', 'utf8').trim());
    console.log('done');
  }
})();

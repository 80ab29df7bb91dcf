'use strict';
// Uses all of the Node SDK, as conformance_test.go asks for.
const crac = require('@crac-shim/crac');

const failing = new Set();

for (const name of ['one', 'two', 'three']) {
  for (const [register, event] of [
    [crac.onCheck, 'check'],
    [crac.beforeCheckpoint, 'before-checkpoint'],
    [crac.afterResume, 'after-resume'],
    [crac.afterRestore, 'after-restore'],
  ]) {
    register(async () => {
      console.log(event, name);
      await null;
      if (failing.has(`${event} ${name}`)) throw new Error(`${name} says no`);
    });
  }
}

async function run(command, ...args) {
  switch (command) {
    case 'fail':
      failing.add(args.join(' '));
      return 'failing';
    case 'status':
      return `status ${(await crac.status()).start}`;
    case 'checkpoint':
      return `checkpoint ${await crac.checkpoint()}`;
    case 'env':
      return ['env', process.env[args[0]]].join(' ').trim();
    case 'restore': {
      const r = crac.lastRestore();
      return ['restore', r.generation, r.container, r.hostname, r.frozenMs * 1e6, ...r.args].join(' ');
    }
  }
  throw new TypeError(command);
}

(async () => {
  // The server listens a moment after require.
  for (let i = 0; i < 100 && !crac.available(); i++) await new Promise((r) => setTimeout(r, 1));
  console.log('ready');
  for await (const line of require('readline').createInterface({ input: process.stdin })) {
    try {
      console.log(await run(...line.split(' ')));
    } catch (err) {
      if (!(err instanceof crac.CheckpointError)) throw err;
      console.log(line.split(' ')[0], 'error:', err.message);
    }
  }
})();

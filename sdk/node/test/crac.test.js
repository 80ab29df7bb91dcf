'use strict';
// What is Node's own about the SDK: threads, modules, random generators. The contract is tested
// for all languages by sdk/conformance_test.go; sdk/node_test.go runs this, with the native part
// (CRAC_TEST_RESEED=openssl) and without (functions).
const assert = require('assert');
const { execFile, spawn } = require('child_process');
const fs = require('fs');
const net = require('net');
const os = require('os');
const path = require('path');
const { test, after, mock } = require('node:test');
const { promisify } = require('util');
const { Worker } = require('worker_threads');

const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'crac'));
after(() => fs.rmSync(dir, { recursive: true }));
process.env.CRAC_DIR = dir;
const how = process.env.CRAC_TEST_RESEED;

process.removeAllListeners('warning'); // those that the tests provoke
const warnings = [];
process.on('warning', (w) => warnings.push(w.message));

const crac = require('@crac-shim/crac');
const sdk = JSON.stringify(require.resolve('@crac-shim/crac')); // for other programs
const crypto = require('crypto');
const { randomBytes } = crypto; // as most programs take it

// tell plays the runtime's part. It waits until somebody listens.
async function tell(event, more = {}, name = `node-${process.pid}.sock`) {
  for (let tries = 0; ; tries++) {
    try {
      return await new Promise((resolve, reject) => {
        const socket = net.connect(path.join(dir, name));
        let text = '';
        socket.on('error', reject);
        socket.on('data', (data) => { text += data; });
        socket.on('close', (failed) => failed || resolve(JSON.parse(text)));
        socket.write(JSON.stringify({ v: 1, event, id: '1', deadline_ms: 10000, ...more }) + '\n');
      });
    } catch (err) {
      if (!['ENOENT', 'ECONNREFUSED'].includes(err.code) || tries > 500) throw err;
      await new Promise((r) => setTimeout(r, 20));
    }
  }
}

test('require and import give the same, and all of it is declared', async () => {
  const esm = await import(require.resolve('@crac-shim/crac').replace(/index\.js$/, 'index.mjs'));
  assert.strictEqual(esm.default, crac);
  assert.deepStrictEqual(Object.keys(esm).filter((k) => k !== 'default').sort(), Object.keys(crac).sort());
  for (const name of Object.keys(crac)) assert.strictEqual(esm[name], crac[name]);
  const types = fs.readFileSync(path.join(path.dirname(require.resolve('@crac-shim/crac')), 'index.d.ts'), 'utf8');
  const declared = [...types.matchAll(/^export (?:function|const|class) (\w+)/gm)].map((m) => m[1]);
  assert.deepStrictEqual(declared.sort(), Object.keys(crac).sort());
});

test('a second copy of the package takes no part of its own', () => {
  const file = require.resolve('@crac-shim/crac');
  const copy = { exports: {} };
  new Function('require', 'module', fs.readFileSync(file, 'utf8'))(() => assert.fail('it was loaded'), copy);
  assert.strictEqual(copy.exports, crac);
});

test('a program that does nothing else ends', async () => {
  await promisify(execFile)(process.execPath, ['-e', `require(${sdk}).afterRestore(() => {})`], { timeout: 60000 });
});

test('hooks get what they are about, and can be taken back', async () => {
  const calls = [];
  const remove = [
    crac.afterRestore((r) => calls.push(r.generation)),
    crac.afterResume((o) => { calls.push(o); }),
    crac.beforeCheckpoint(() => { calls.push('before'); }),
  ];
  await tell('before-checkpoint');
  await tell('after-resume', { outcome: 'failed', error: 'busy' });
  await tell('before-checkpoint');
  await tell('after-restore', { generation: 'g' });
  assert.deepStrictEqual(calls, ['before', { outcome: 'failed', error: 'busy' }, 'before', 'g']);
  for (const r of remove) r();
  await tell('before-checkpoint');
  await tell('after-restore');
  assert.strictEqual(calls.length, 4);
  assert.throws(() => crac.onCheck(7), /a hook must be a function, not number/);
});

test('a hook that does not end in time is named', async () => {
  const remove = crac.beforeCheckpoint(function closePool() { return new Promise(() => {}); });
  assert.deepStrictEqual(await tell('before-checkpoint', { deadline_ms: 200 }), { ok: false, error: 'closePool: has not ended in time' });
  remove();
  assert.deepStrictEqual(await tell('after-resume', { outcome: 'failed' }), { ok: true });
  assert.ok(warnings.some((w) => w.includes('closePool')));
});

test('notifications are answered one at a time', async () => {
  const calls = [];
  const remove = crac.onCheck(async () => {
    calls.push('begin');
    await new Promise((r) => setTimeout(r, 50));
    calls.push('end');
  });
  await Promise.all([tell('check'), tell('check'), tell('check')]);
  assert.deepStrictEqual(calls, ['begin', 'end', 'begin', 'end', 'begin', 'end']);
  remove();
});

test('a worker thread takes part for itself', async () => {
  const worker = new Worker(`
    const { parentPort } = require('worker_threads');
    require(${sdk}).onCheck(() => parentPort.postMessage('asked'));
    parentPort.once('message', () => parentPort.close());`, { eval: true });
  const asked = new Promise((resolve) => worker.once('message', resolve));
  const name = `node-${process.pid}-${worker.threadId}.sock`;
  assert.deepStrictEqual(await tell('check', {}, name), { ok: true });
  assert.strictEqual(await asked, 'asked');
  const exited = new Promise((resolve) => worker.once('exit', resolve));
  worker.postMessage('end');
  await exited;
  assert.ok(!fs.existsSync(path.join(dir, name)));
});

test('a worker of the cluster module listens itself', async () => {
  const script = path.join(dir, '.cluster.js');
  fs.writeFileSync(script, `
    const cluster = require('cluster');
    if (cluster.isPrimary) {
      const w = cluster.fork();
      console.log(w.process.pid);
      process.stdin.on('end', () => process.exit()).resume();
    } else {
      require(${sdk}).onCheck(() => { throw new Error('I am ' + process.pid); });
    }`);
  const primary = spawn(process.execPath, [script], { stdio: ['pipe', 'pipe', 'ignore'] });
  const pid = await new Promise((resolve) => primary.stdout.once('data', (d) => resolve(parseInt(d, 10))));
  const answer = await tell('check', {}, `node-${pid}.sock`);
  assert.match(answer.error, new RegExp(`I am ${pid}$`));
  primary.stdin.end();
  await new Promise((resolve) => primary.once('exit', resolve));
});

// Last: what a restore does to this process stays.
test('after a restore', async (t) => {
  const seen = new Set();
  const restore = async () => assert.deepStrictEqual(await tell('after-restore'), { ok: true });

  await t.test('Math.random has a new seed, also where it was taken before', async () => {
    const { random } = Math;
    for (let i = 0; i < 3; i++) {
      await restore();
      for (const draw of [Math.random, random]) {
        const n = draw();
        assert.ok(n >= 0 && n < 1 && !seen.has(n));
        seen.add(n);
      }
    }
    const mean = Array.from({ length: 10000 }, Math.random).reduce((a, b) => a + b) / 10000;
    assert.ok(Math.abs(mean - 0.5) < 0.03, `the mean of 10000 numbers is ${mean}`);
  });

  await t.test('reseed says what it could do', () => assert.strictEqual(crac.reseed(), how));

  await t.test('a program may keep its seeds', async () => {
    crac.settings.reseed = false;
    const read = mock.method(fs, 'openSync', () => assert.fail('it asks for a seed'));
    await restore();
    read.mock.restore();
    crac.settings.reseed = true;
  });

  if (how === 'openssl') {
    await t.test('a helper that fails is told', async () => {
      mock.method(process, 'dlopen', () => { throw new Error('no entropy'); });
      assert.deepStrictEqual(await tell('after-restore'), { ok: false, error: 'reseed: no entropy' });
      mock.restoreAll();
    });
    return;
  }

  assert.ok(warnings.some((w) => w.includes('npm run build')), 'nothing is said about the native part that is missing');
  const constant = Buffer.alloc(64, 7);
  const zeros = (n) => constant.subarray(0, n);
  const { randomFillSync: esmFill } = await import('crypto');
  // A kernel that is not random: what is drawn then has come from it and nowhere else.
  const kernel = () => mock.method(fs, 'readSync', (_, view, at, n) => { view.fill(7, at, at + n); return n; });
  const p = promisify;
  for (const [name, draw, want] of [
    ['randomBytes', () => crypto.randomBytes(8), zeros(8)],
    ['randomBytes, taken before', () => randomBytes(8), zeros(8)],
    ['randomBytes, later', () => p(crypto.randomBytes)(8), zeros(8)],
    ['pseudoRandomBytes', () => crypto.pseudoRandomBytes(8), zeros(8)],
    ['randomFillSync', () => crypto.randomFillSync(Buffer.alloc(8)), zeros(8)],
    ['randomFillSync, imported', () => esmFill(Buffer.alloc(8)), zeros(8)],
    ['randomFillSync, a part', () => crypto.randomFillSync(Buffer.alloc(8), 2, 3), Buffer.from([0, 0, 7, 7, 7, 0, 0, 0])],
    ['randomFillSync, the end', () => crypto.randomFillSync(Buffer.alloc(4), 3), Buffer.from([0, 0, 0, 7])],
    ['randomFillSync, wide elements', () => crypto.randomFillSync(new Uint16Array(3), 1, 1), new Uint16Array([0, 0x0707, 0])],
    ['randomFillSync, ArrayBuffer', () => new Uint8Array(crypto.randomFillSync(new ArrayBuffer(2))), new Uint8Array([7, 7])],
    ['randomFill', () => p(crypto.randomFill)(Buffer.alloc(8)), zeros(8)],
    ['randomFill, a part', () => p(crypto.randomFill)(Buffer.alloc(4), 1, 2), Buffer.from([0, 7, 7, 0])],
    ['randomInt', () => crypto.randomInt(1000), 0x070707070707 % 1000],
    ['randomInt, min', () => crypto.randomInt(-5, 1000), -5 + 0x070707070707 % 1005],
    ['randomInt, later', () => p(crypto.randomInt)(1000), 0x070707070707 % 1000],
    ['randomUUID', () => crypto.randomUUID(), '07070707-0707-4707-8707-070707070707'],
    ['getRandomValues', () => crypto.webcrypto.getRandomValues(new Uint8Array(2)), new Uint8Array([7, 7])],
    ['webcrypto.randomUUID', () => crypto.webcrypto.randomUUID(), '07070707-0707-4707-8707-070707070707'],
  ]) {
    await t.test(`${name} asks the kernel`, async () => {
      const real = await draw();
      const read = kernel();
      try {
        assert.deepStrictEqual(await draw(), want);
      } finally {
        read.mock.restore();
      }
      assert.notDeepStrictEqual(real, want);
    });
  }

  await t.test('arguments are checked as ever', () => {
    assert.throws(() => crypto.randomBytes(-1), { code: 'ERR_OUT_OF_RANGE' });
    assert.throws(() => crypto.randomFillSync('x'), { code: 'ERR_INVALID_ARG_TYPE' });
    assert.throws(() => crypto.randomInt(5, 5), { code: 'ERR_OUT_OF_RANGE' });
    assert.throws(() => crypto.webcrypto.getRandomValues(new Float64Array(1)), { name: 'TypeMismatchError' });
    for (let i = 0; i < 100; i++) {
      const n = crypto.randomInt(3, 6);
      assert.ok(n >= 3 && n < 6);
    }
  });
});

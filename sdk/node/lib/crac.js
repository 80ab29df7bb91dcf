'use strict';
// The listening side: a server that is told what happens, and calls the hooks.
const fs = require('fs');
const net = require('net');
const path = require('path');
const { threadId } = require('worker_threads');
const { ask, readLine, directory, CheckpointError, RestoreError, Unavailable } = require('./control');
const environ = require('./environ');
const { takeOver, reseed } = require('./reseed');

const settings = { reseed: true, environ: true };
const hooks = { 'before-checkpoint': [], 'after-restore': [], 'after-resume': [], check: [] };

let listening = false;
let restored = null; // the last restore
let told = null; // the notification that the hooks are being called for
let stopped = false; // before-checkpoint came, what ends it did not yet
let ended = null; // the last after-resume or after-restore
let errors = []; // of the hooks, since the last before-checkpoint
let waiting = []; // to be called when ended changes
let queue = Promise.resolve(); // of notifications: one at a time

const warn = (text) => process.emitWarning(text, 'CracWarning');

function register(event, fn) {
  if (typeof fn !== 'function') throw new TypeError(`a hook must be a function, not ${typeof fn}`);
  const hook = { fn };
  hooks[event].push(hook);
  return () => {
    hooks[event] = hooks[event].filter((h) => h !== hook);
  };
}

// call calls the hooks of an event, each though another fails, and returns what they threw.
async function call(event, deadline, ...args) {
  const all = [...(Object.hasOwn(hooks, event) ? hooks[event] : [])];
  if (event === 'before-checkpoint' || event === 'check') all.reverse();
  const failed = [];
  for (const { fn } of all) {
    try {
      await inTime(fn(...args), deadline - performance.now());
    } catch (err) {
      const name = fn.name || 'a function';
      warn(`the ${event} hook ${name} failed: ${err?.stack ?? err}`);
      failed.push({ name, err });
    }
  }
  return failed;
}

function inTime(result, ms) {
  if (typeof result?.then !== 'function') return undefined;
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('has not ended in time')), Math.max(ms, 0));
  });
  return Promise.race([result, late]).finally(() => clearTimeout(timer));
}

// adapt makes the process what a clone should be, ahead of its hooks.
function adapt(message) {
  restored = {
    generation: message.generation ?? '',
    container: message.container ?? '',
    hostname: message.hostname ?? '',
    env: message.env ?? {},
    args: message.args ?? [],
    annotations: message.annotations ?? {},
    frozenMs: (message.frozen_ns ?? 0) / 1e6,
  };
  const failed = [];
  for (const [wanted, name, fn] of [
    [settings.reseed, 'reseed', reseed],
    [settings.environ && message.env, 'environ', () => environ.update(message.env)],
  ]) {
    try {
      if (wanted) fn();
    } catch (err) {
      warn(`after a restore, ${name} failed: ${err.stack}`);
      failed.push({ name, err });
    }
  }
  return failed;
}

async function notify(message) {
  const { event, deadline_ms: ms = 10000 } = message;
  // A little before the runtime's, which would not know which hook it waits for.
  const deadline = performance.now() + 0.95 * ms;
  told = message;
  let failed = [];
  let args = [];
  switch (event) {
    case 'before-checkpoint':
      stopped = true;
      errors = [];
      break;
    case 'after-restore':
      failed = adapt(message);
      args = [restored];
      break;
    case 'after-resume':
      args = [{ outcome: message.outcome, ...(message.error && { error: message.error }) }];
  }
  failed.push(...await call(event, deadline, ...args));
  errors.push(...failed.map((f) => f.err));
  return failed.map(({ name, err }) => `${name}: ${err?.message ?? err}`);
}

async function serve(socket) {
  const late = setTimeout(() => socket.destroy(), 10000);
  late.unref();
  const line = await readLine(socket).catch(() => null);
  clearTimeout(late);
  if (line === null) {
    socket.end();
    return;
  }
  socket.on('error', () => {}); // the runtime has given up; the hooks run all the same
  queue = queue.then(() => answer(socket, line));
}

async function answer(socket, line) {
  let failed;
  try {
    const message = JSON.parse(line);
    if (typeof message?.event !== 'string') throw new TypeError('no event');
    failed = await notify(message);
  } catch (err) {
    failed = [`not a notification: ${err.message}`];
  }
  const reply = failed.length ? { ok: false, error: failed.join('; ').slice(0, 4096) } : { ok: true };
  // Not end(): the runtime would see the end before the socket is closed, and dump it half closed.
  await new Promise((resolve) => socket.write(JSON.stringify(reply) + '\n', resolve));
  if (told?.event.startsWith('after-')) {
    stopped = false;
    ended = told;
    for (const wake of waiting.splice(0)) wake();
  }
  told = null;
  socket.destroy();
}

async function checkpoint() {
  if (told || stopped) throw new CheckpointError('a checkpoint or a restore is under way already');
  const before = ended;
  const { id } = await ask({ op: 'checkpoint' });
  const mine = () => ended !== before && (ended.event === 'after-restore' || ended.id === id);
  let end;
  let resumed = false;
  for (;;) {
    if (listening && !resumed) {
      // Not kept alive by the server, which is unref'ed, but by this wait.
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, 1000);
        const wake = () => (mine() ? (clearTimeout(timer), resolve()) : waiting.push(wake));
        wake();
      });
      if (mine()) {
        end = ended;
        resumed = end.outcome === 'checkpointed';
        if (!resumed) break;
      }
    }
    // In the original, the image takes longer than our hooks.
    end = await ask({ op: 'outcome', id, wait_ms: listening && !resumed ? 0 : 5000 });
    // Were we told of its beginning, we shall be told of its end.
    if (end.outcome !== 'pending' && !stopped) break;
  }
  const outcome = end.outcome ?? 'restored';
  if (outcome === 'failed') throw new CheckpointError(end.error || 'the checkpoint failed', errors);
  if (outcome === 'restored' && errors.length) {
    throw new RestoreError(errors.map((e) => e?.message ?? e).join('; '), errors);
  }
  return outcome;
}

// socketPath chooses this thread's name. One that another process listens at gets the process id added.
async function socketPath() {
  const self = threadId === 0 ? `${process.pid}` : `${process.pid}-${threadId}`;
  const name = process.env.CRAC_NAME;
  if (!name) return path.join(directory, `node-${self}.sock`);
  if (name.includes('/') || name.startsWith('.') || name === 'control') {
    throw new Error(`CRAC_NAME=${name}: not a name for a socket: leave out slashes, a dot in front, and 'control'`);
  }
  const wanted = path.join(directory, `${name}.sock`);
  const taken = await new Promise((resolve) => {
    const socket = net.connect(wanted, () => { socket.destroy(); resolve(true); });
    socket.on('error', () => resolve(false));
  });
  return taken ? path.join(directory, `${name}-${self}.sock`) : wanted;
}

// sweep removes what processes left that ended without a chance to.
function sweep() {
  for (const name of fs.readdirSync(directory)) {
    const left = /^node-(\d+)(-\d+)?\.sock$/.exec(name);
    if (left && !fs.existsSync(`/proc/${left[1]}`)) fs.rmSync(path.join(directory, name), { force: true });
  }
}

async function start() {
  if (!fs.existsSync(directory)) return;
  takeOver();
  try {
    sweep();
    const file = await socketPath();
    fs.rmSync(file, { force: true });
    const server = net.createServer({ allowHalfOpen: true }, serve);
    await new Promise((resolve, reject) => {
      server.once('error', reject);
      // exclusive: a worker of the cluster module would let its primary listen. No other name first
      // and a rename: CRIU restores it by the name it was bound to.
      server.listen({ path: file, exclusive: true }, resolve);
    });
    server.on('error', (err) => warn(`${file}: ${err.message}`));
    server.unref();
    process.on('exit', () => fs.rmSync(file, { force: true }));
    listening = true;
  } catch (err) {
    // The program works without; that it is not told must not go unseen.
    warn(`this process takes no part in checkpoints: ${err.message}`);
  }
}

start();

module.exports = {
  beforeCheckpoint: (fn) => register('before-checkpoint', fn),
  afterRestore: (fn) => register('after-restore', fn),
  afterResume: (fn) => register('after-resume', fn),
  onCheck: (fn) => register('check', fn),
  checkpoint,
  status: () => ask({ op: 'status' }),
  lastRestore: () => restored,
  available: () => listening,
  reseed,
  settings,
  CheckpointError,
  RestoreError,
  Unavailable,
};

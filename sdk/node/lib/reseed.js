'use strict';
// New seeds for the random generators that a process has in its own memory.
//
// A clone's memory is its siblings': without new seeds they all draw the same numbers. Node's
// generator is OpenSSL's, which no function of Node reseeds; native/reseed.c does. Where that
// is not built, the functions that return random numbers take them from the kernel instead, once
// the process has been restored.
const crypto = require('crypto');
const fs = require('fs');
const { syncBuiltinESMExports } = require('module');
const path = require('path');

const helper = path.join(__dirname, '..', 'native', `${process.platform}-${process.arch}.node`);

let fromKernel = false; // what the replaced functions do
let mathRandom;

// takeOver prepares for a restore, as early as possible: code that took a function out of
// require('crypto') before would keep the original.
function takeOver() {
  const original = Math.random;
  Math.random = function random() { return mathRandom ? mathRandom() : original(); };
  if (fs.existsSync(helper)) return;
  process.emitWarning(`${helper} is not built (npm run build): after a restore, keys and TLS of clones are made from ` +
    'the same random numbers; only the functions that return random numbers give new ones', 'CracWarning');
  replaceFunctions();
}

function reseed() {
  mathRandom = generator(kernel(Buffer.alloc(16)));
  if (!fs.existsSync(helper)) {
    if (crypto.randomBytes[own] !== true) replaceFunctions();
    fromKernel = true;
    return 'functions';
  }
  process.dlopen({ exports: {} }, helper); // throws if OpenSSL has no new seed
  // Node draws in advance for these two: 128 identifiers and 1024 numbers.
  for (let i = 0; i < 128; i++) crypto.randomUUID();
  for (let i = 0; i < 1024; i++) crypto.randomInt(2);
  return 'openssl';
}

// generator is a Math.random: sfc32, of the public domain, by Chris Doty-Humphrey.
function generator(seed) {
  let [a, b, c, d] = new Uint32Array(seed.buffer, seed.byteOffset, 4);
  const next = () => {
    const t = (a + b + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t | 0;
    return t >>> 0;
  };
  for (let i = 0; i < 12; i++) next();
  return () => (next() * 0x200000 + (next() >>> 11)) / 2 ** 53;
}

// kernel fills a view with random bytes.
function kernel(view) {
  const bytes = Buffer.from(view.buffer, view.byteOffset, view.byteLength);
  const fd = fs.openSync('/dev/urandom', 'r');
  try {
    for (let at = 0; at < bytes.length;) at += fs.readSync(fd, bytes, at, bytes.length - at, null);
  } finally {
    fs.closeSync(fd);
  }
  return view;
}

const own = Symbol('crac');

// replace puts fn in the place of object[name] for restored processes. fn gets the original, which
// it calls first: that checks the arguments.
function replace(object, name, fn) {
  const original = object[name];
  if (typeof original !== 'function') return;
  const replacement = function (...args) {
    return fromKernel ? fn.call(this, original, args) : original.apply(this, args);
  };
  Object.defineProperty(replacement, 'name', { value: name });
  replacement[own] = true;
  Object.defineProperty(object, name, { ...Object.getOwnPropertyDescriptor(object, name), value: replacement });
}

function replaceFunctions() {
  const then = (cb, fn) => (err, result) => (err ? cb(err) : cb(null, fn(result)));

  function randomBytes(original, [size, cb]) {
    if (typeof cb !== 'function') return kernel(original(size, cb));
    return original(size, then(cb, kernel));
  }
  replace(crypto, 'randomBytes', randomBytes);
  for (const name of ['pseudoRandomBytes', 'prng', 'rng']) { // its deprecated names
    if (name in crypto) crypto[name] = crypto.randomBytes;
  }
  replace(crypto, 'randomFillSync', (original, args) => {
    original(...args);
    kernel(part(...args));
    return args[0];
  });
  replace(crypto, 'randomFill', (original, args) => {
    const cb = args.pop();
    return original(...args, typeof cb === 'function' ? then(cb, () => { kernel(part(...args)); return args[0]; }) : cb);
  });
  replace(crypto, 'randomInt', (original, args) => {
    const cb = typeof args[args.length - 1] === 'function' ? args.pop() : undefined;
    original(...args); // checks them
    const [min, max] = args.length > 1 ? args : [0, args[0]];
    const n = min + below(max - min);
    return cb ? process.nextTick(cb, undefined, n) : n;
  });
  replace(crypto, 'randomUUID', (original, args) => {
    original(...args);
    return uuid();
  });
  const prototype = Object.getPrototypeOf(crypto.webcrypto);
  replace(prototype, 'getRandomValues', function (original, args) {
    return kernel(original.apply(this, args));
  });
  replace(prototype, 'randomUUID', function (original, args) {
    original.apply(this, args);
    return uuid();
  });
  syncBuiltinESMExports(); // for import { randomBytes } from 'crypto'
}

// part is what randomFill(buffer, offset, size) means; both count elements.
function part(buffer, offset = 0, size) {
  const view = ArrayBuffer.isView(buffer) ? buffer : new Uint8Array(buffer);
  const width = view.BYTES_PER_ELEMENT ?? 1;
  const end = size === undefined ? view.byteLength : (offset + size) * width;
  return new Uint8Array(view.buffer, view.byteOffset + offset * width, end - offset * width);
}

// below is a number of [0, range), range at most 2^48: drawn again where the rest of a division
// would favour small ones.
function below(range) {
  const limit = 2 ** 48 - (2 ** 48 % range);
  for (;;) {
    const n = kernel(Buffer.alloc(6)).readUIntBE(0, 6);
    if (n < limit) return n % range;
  }
}

function uuid() {
  const b = kernel(Buffer.alloc(16));
  b[6] = (b[6] & 0x0f) | 0x40;
  b[8] = (b[8] & 0x3f) | 0x80;
  return b.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
}

module.exports = { takeOver, reseed };

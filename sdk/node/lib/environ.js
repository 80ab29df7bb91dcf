'use strict';
// The environment of a clone's own start.
const fs = require('fs');

// What the container was started with. Its first process knows; between that and this one a
// script may have changed more, which a restore must leave alone.
function ofStart() {
  for (const pid of ['1', 'self']) {
    let text;
    try {
      text = fs.readFileSync(`/proc/${pid}/environ`, 'utf8');
    } catch {
      continue;
    }
    const env = new Map();
    for (const pair of text.split('\0')) {
      const at = pair.indexOf('=');
      if (at > 0) env.set(pair.slice(0, at), pair.slice(at + 1));
    }
    if (env.has('CRAC_DIR')) return env;
  }
  return new Map(Object.entries(process.env));
}

let before = ofStart();

// Puts into process.env what differs between the request that started the container first and
// this one. What the program itself changed stays, unless the request changed the same variable;
// a variable goes that the request no longer has.
function update(env) {
  const now = new Map(Object.entries(env));
  for (const name of new Set([...before.keys(), ...now.keys()])) {
    // CRAC_DIR is where the sockets are, in a clone too.
    if (name === 'CRAC_DIR' || before.get(name) === now.get(name)) continue;
    if (now.has(name)) {
      process.env[name] = now.get(name);
    } else if (process.env[name] === before.get(name)) {
      delete process.env[name];
    }
  }
  before = now;
}

module.exports = { update };

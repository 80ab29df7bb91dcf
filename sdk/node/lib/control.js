'use strict';
// Requests to the runtime, over control.sock.
const fs = require('fs');
const net = require('net');
const path = require('path');
const { setTimeout: sleep } = require('timers/promises');

class CheckpointError extends Error {
  constructor(message, errors = []) {
    super(message);
    this.errors = errors;
  }
  get name() { return this.constructor.name; }
}
class RestoreError extends CheckpointError {}
class Unavailable extends CheckpointError {}

// A shell or su may have dropped the variable.
const directory = process.env.CRAC_DIR || '/run/crac';

// During a dump there is no control.sock, so it is tried again. Tries are counted, not
// seconds: frozen, a process has none.
async function ask(request, tries = 500) {
  const name = path.join(directory, 'control.sock');
  if (!fs.existsSync(directory)) {
    throw new Unavailable(`${directory} does not exist: this container does not run under io.containerd.crac.v2, or with hooks=off`);
  }
  for (;;) {
    let line;
    try {
      line = await exchange(name, JSON.stringify({ v: 1, ...request }) + '\n');
    } catch (err) {
      if (!['ENOENT', 'ECONNREFUSED', 'ECONNRESET', 'EPIPE', 'EOF'].includes(err.code) || --tries <= 0) {
        throw new Unavailable(`${name} does not answer: ${err.message}`);
      }
      await sleep(20);
      continue;
    }
    const answer = JSON.parse(line);
    if (answer.ok !== true) {
      throw new CheckpointError(answer.error || `${name}: the runtime refused without a reason`);
    }
    return answer;
  }
}

function exchange(name, text) {
  return new Promise((resolve, reject) => {
    const socket = net.connect(name, () => socket.write(text));
    readLine(socket).then((line) => {
      socket.destroy();
      if (line === null) {
        reject(Object.assign(new Error('the connection was closed'), { code: 'EOF' }));
      } else {
        resolve(line);
      }
    }, reject);
  });
}

// readLine gives what comes before the first newline, or null if the connection ends without one.
function readLine(socket, most = 1 << 20) {
  return new Promise((resolve, reject) => {
    const parts = [];
    let size = 0;
    socket.on('error', reject);
    socket.on('end', () => resolve(null));
    socket.on('close', () => resolve(null));
    socket.on('data', (data) => {
      const end = data.indexOf(10);
      parts.push(end < 0 ? data : data.subarray(0, end));
      size += data.length;
      if (end >= 0) {
        socket.pause();
        resolve(Buffer.concat(parts).toString());
      } else if (size > most) {
        resolve(null);
      }
    });
  });
}

module.exports = { ask, readLine, directory, CheckpointError, RestoreError, Unavailable };

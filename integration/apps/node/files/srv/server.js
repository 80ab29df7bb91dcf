// A workload for checkpoints: an HTTP server whose state is only in memory: a
// counter, a timer, and a worker thread that every count goes through.
'use strict';
const http = require('http');
const { Worker } = require('worker_threads');

const worker = new Worker(
  "require('worker_threads').parentPort.on('message', (n) => require('worker_threads').parentPort.postMessage(n))",
  { eval: true },
);
const waiting = [];
worker.on('message', (echo) => waiting.shift()(echo));
worker.on('error', (err) => { throw err; });

let count = 0;
let ticks = 0;
setInterval(() => { ticks += 1; }, 100);

const server = http.createServer((req, res) => {
  res.setHeader('Content-Type', 'text/plain');
  if (req.url === '/') {
    res.end(`ok\npid=${process.pid}\n`);
  } else if (req.url === '/count') {
    count += 1;
    const n = count;
    waiting.push((echo) => res.end(`count=${n}\necho=${echo}\nticks=${ticks}\npid=${process.pid}\n`));
    worker.postMessage(n);
  } else {
    res.statusCode = 404;
    res.end('not found\n');
  }
});
server.listen(8080, '0.0.0.0', () => console.log('node: listening on 8080'));
// As PID 1 there is no default action for signals.
process.on('SIGTERM', () => process.exit(0));

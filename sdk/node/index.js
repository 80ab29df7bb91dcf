'use strict';
// One participant for each thread, however many copies of the package are installed.
module.exports = globalThis[Symbol.for('@crac-shim/crac')] ??= require('./lib/crac');

export * from './index.js';
import * as crac from './index.js';
export default crac;

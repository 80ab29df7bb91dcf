import crac from './index.js';

export default crac;
export const {
  beforeCheckpoint,
  afterRestore,
  afterResume,
  onCheck,
  checkpoint,
  status,
  lastRestore,
  available,
  reseed,
  settings,
  CheckpointError,
  RestoreError,
  Unavailable,
} = crac;

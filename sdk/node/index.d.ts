/** What a clone was told about itself. env, args and annotations are those of the request that started it. */
export interface Restore {
  /** New for each clone. */
  generation: string;
  container: string;
  hostname: string;
  env: Record<string, string>;
  args: string[];
  annotations: Record<string, string>;
  /** How long it was frozen, in milliseconds. */
  frozenMs: number;
}

/** How a checkpoint ended in the original, which goes on. */
export interface Outcome {
  outcome: 'checkpointed' | 'failed';
  error?: string;
}

/** What this container is; docs/hooks.md lists all of it. */
export interface Status {
  container: string;
  hostname?: string;
  start: 'cold' | 'warm';
  image?: string;
  /** Why the start was cold. */
  reason?: string;
  code?: string;
  generation?: string;
  checkpoint?: { allowed: boolean; last?: { id: string; outcome: string; error?: string } };
}

type Hook<T extends unknown[]> = (...args: T) => void | Promise<void>;
/** Forgets the hook. */
type Unregister = () => void;

/** Has fn called before a checkpoint, last registered first. If it throws or rejects, there is no checkpoint. */
export function beforeCheckpoint(fn: Hook<[]>): Unregister;
/** Has fn called in each clone, before its start is reported. process.env is up to date then. */
export function afterRestore(fn: Hook<[Restore]>): Unregister;
/** Has fn called in the original when it goes on: after a checkpoint, and after one that failed. */
export function afterResume(fn: Hook<[Outcome]>): Unregister;
/** Has fn called when somebody asks whether a checkpoint would be possible now. It throws if not, and changes nothing. */
export function onCheck(fn: Hook<[]>): Unregister;

/**
 * Asks for a checkpoint of the container and waits until it has happened and this thread's hooks were called.
 * Resolves with 'checkpointed' in the original, if that goes on, and with 'restored' in each clone.
 * Rejects with CheckpointError, RestoreError or Unavailable.
 */
export function checkpoint(): Promise<'checkpointed' | 'restored'>;
/** What this container is. Rejects with Unavailable in a container of another runtime. */
export function status(): Promise<Status>;
/** The restore that made this clone, or null in a process that was never restored. */
export function lastRestore(): Restore | null;
/** Whether this thread takes part in checkpoints. */
export function available(): boolean;
/**
 * What happens after each restore: new seeds for this process's random generators. 'openssl' if OpenSSL itself
 * got one; 'functions' if only the functions that return random numbers did (README.md).
 */
export function reseed(): 'openssl' | 'functions';

/** What happens by itself after a restore. Read at each. */
export const settings: { reseed: boolean; environ: boolean };

/** There was no checkpoint. errors holds what this thread's own hooks threw. */
export class CheckpointError extends Error {
  errors: unknown[];
}
/** The program was restored, but afterRestore hooks of this thread failed. */
export class RestoreError extends CheckpointError {}
/** Nobody is there to ask: another runtime, or hooks=off. */
export class Unavailable extends CheckpointError {}

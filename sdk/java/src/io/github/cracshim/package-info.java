/**
 * Takes part in the checkpoints of the crac containerd runtime, on any JDK from 17 on.
 *
 * <p>The classes {@link io.github.cracshim.Core}, {@link io.github.cracshim.Context},
 * {@link io.github.cracshim.Resource}, {@link io.github.cracshim.CheckpointException} and
 * {@link io.github.cracshim.RestoreException} are those that the library org.crac looks for in the
 * package that the system property {@code org.crac.Core.Compat} names, so that programs written to
 * org.crac need no change. Others use them directly.
 *
 * <h2>What the global context guarantees</h2>
 * <ul>
 * <li>Before a checkpoint resources are told in reverse order of registration, afterwards in order.
 * <li>Every resource is told, also when another one throws. All that was thrown is suppressed in
 *     one exception.
 * <li>A failure before the checkpoint means that there is none, and that everyone is told so by
 *     {@code afterRestore}.
 * <li>Resources are held weakly; from before a checkpoint until after it, strongly.
 * <li>A registration during the notification before a checkpoint waits until that is over; one made
 *     by a resource that is being told takes effect for the next checkpoint.
 * <li>One checkpoint at a time: one that is asked for during another is refused.
 * </ul>
 *
 * <p>The host's side of the protocol is described in docs/hooks.md of the runtime.
 */
package io.github.cracshim;

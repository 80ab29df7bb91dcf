package io.github.cracshim;

/** Something that wants to be told of checkpoints and restores. */
public interface Resource {
    /**
     * Is called before a checkpoint. Whatever it throws prevents the checkpoint.
     *
     * @param context the context that tells
     * @throws Exception if the resource cannot be checkpointed now
     */
    void beforeCheckpoint(Context<? extends Resource> context) throws Exception;

    /**
     * Is called when the program runs again: in a clone, in the original after its checkpoint, and
     * after a checkpoint that failed. {@link Start#current()} tells the first from the others.
     *
     * @param context the context that tells
     * @throws Exception if the resource cannot continue
     */
    void afterRestore(Context<? extends Resource> context) throws Exception;
}

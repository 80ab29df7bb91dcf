package io.github.cracshim;

/** The coordination service. */
public final class Core {
    static {
        // Whoever touches this class, as org.crac does at the first registration,
        // takes part: the collection before a dump helps also without a resource.
        Participant.start();
    }

    private Core() {}

    /**
     * Returns the context that the runtime tells.
     *
     * @return the global context, always the same
     */
    public static Context<Resource> getGlobalContext() {
        return GlobalContext.INSTANCE;
    }

    /**
     * Asks for a checkpoint of this container and returns when it has been made, in the original as
     * in every clone: {@link Start#current()} tells which. Resources are told by the calling thread.
     *
     * <p>The container needs the annotations {@code io.containerd.crac.checkpoint.allow=workload} and
     * {@code io.containerd.crac.checkpoint.image}.
     *
     * @throws CheckpointException if there is no checkpoint, or if resources threw; the program
     *     continues where it is
     * @throws RestoreException if resources threw after a restore; the program continues in a clone
     * @throws UnsupportedOperationException if this is no container of the crac runtime, or its
     *     hooks are off; nobody was told
     */
    public static void checkpointRestore() throws CheckpointException, RestoreException {
        Coordinator.INSTANCE.checkpointRestore();
    }
}

package io.github.cracshim;

/**
 * A resource that others register with. A program may have contexts of its own, registered with
 * the global one.
 *
 * @param <R> what may be registered
 */
public abstract class Context<R extends Resource> implements Resource {
    /** For subclasses. */
    protected Context() {}

    /**
     * Returns the context that the runtime tells.
     *
     * @return the global context, always the same
     */
    public static Context<Resource> getGlobalContext() {
        return GlobalContext.INSTANCE;
    }

    @Override
    public abstract void beforeCheckpoint(Context<? extends Resource> context) throws CheckpointException;

    @Override
    public abstract void afterRestore(Context<? extends Resource> context) throws RestoreException;

    /**
     * Registers a resource. One that is registered already becomes the last one.
     *
     * @param resource what is to be told; the context holds it weakly
     * @throws NullPointerException if resource is null
     */
    public abstract void register(R resource);
}

package io.github.cracshim;

import java.lang.ref.WeakReference;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.Objects;

/** The context that the runtime tells. */
final class GlobalContext extends Context<Resource> {
    static final GlobalContext INSTANCE = new GlobalContext();

    /** In order of registration. Compared by identity: a resource's equals may ask a collected object. */
    private final List<WeakReference<Resource>> registered = new ArrayList<>();

    /** Who was told of the checkpoint under way, in order of registration, held until it is over. */
    private List<Resource> told;

    /** The thread that tells before a checkpoint; null when registrations need not wait. */
    private Thread telling;

    GlobalContext() {}

    @Override
    public void register(Resource resource) {
        Objects.requireNonNull(resource, "resource");
        Participant.start();
        synchronized (this) {
            while (telling != null && telling != Thread.currentThread()) {
                try {
                    wait();
                } catch (InterruptedException e) {
                    Thread.currentThread().interrupt();
                    throw new IllegalStateException("interrupted while waiting for the checkpoint under way to register a resource", e);
                }
            }
            for (Iterator<WeakReference<Resource>> all = registered.iterator(); all.hasNext(); ) {
                Resource r = all.next().get();
                if (r == null || r == resource) {
                    all.remove();
                }
            }
            registered.add(new WeakReference<>(resource));
        }
    }

    @Override
    public void beforeCheckpoint(Context<? extends Resource> context) throws CheckpointException {
        List<Resource> all = new ArrayList<>();
        synchronized (this) {
            for (WeakReference<Resource> ref : registered) {
                Resource r = ref.get();
                if (r != null) {
                    all.add(r);
                }
            }
            told = all;
            telling = Thread.currentThread();
        }
        CheckpointException failed = null;
        for (int i = all.size() - 1; i >= 0; i--) {
            try {
                all.get(i).beforeCheckpoint(this);
            } catch (Throwable t) { // an Error of one must not keep the others from being told
                if (failed == null) {
                    failed = new CheckpointException();
                }
                Failures.add(failed, t);
            }
        }
        if (failed != null) {
            throw failed;
        }
    }

    @Override
    public void afterRestore(Context<? extends Resource> context) throws RestoreException {
        List<Resource> all;
        synchronized (this) {
            all = told;
            told = null;
            telling = null;
            notifyAll();
        }
        if (all == null) {
            return; // the checkpoint was made without asking
        }
        RestoreException failed = null;
        for (Resource r : all) {
            try {
                r.afterRestore(this);
            } catch (Throwable t) {
                if (failed == null) {
                    failed = new RestoreException();
                }
                Failures.add(failed, t);
            }
        }
        if (failed != null) {
            throw failed;
        }
    }
}

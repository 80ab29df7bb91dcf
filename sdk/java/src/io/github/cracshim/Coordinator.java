package io.github.cracshim;

import java.io.IOException;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** Carries the runtime's notifications to the resources, and requests for checkpoints to the runtime. */
final class Coordinator {
    static final Coordinator INSTANCE = new Coordinator();

    /** How long a request waits for word before it asks the runtime what has become of it. */
    private static final long POLL_MILLIS = 500;

    /** How long a notification waits for a request that is just being answered. */
    private static final long ASKING_NANOS = TimeUnit.SECONDS.toNanos(2);

    /** The call of checkpointRestore under way, or null. */
    private Request request;

    /** Whether resources were told before a checkpoint and not yet after it. */
    private boolean inProgress;

    private CheckpointException vetoed;
    private KeepAlive keepAlive;

    private Coordinator() {}

    /** A call of checkpointRestore. Its fields are guarded by the coordinator. */
    private static final class Request {
        boolean asking; // the runtime has the question and we not yet its answer
        String id; // of the checkpoint, from the answer on
        boolean told; // its thread has told resources before the checkpoint
        boolean ended;
        Map<String, Object> offered; // to its thread, by the listening one
        String answer; // to that
        boolean delivered; // the runtime has the answer

        boolean concerns(Map<String, Object> message) {
            return told || id != null && id.equals(Json.string(message, "id"));
        }
    }

    /** What a notification came to. */
    private static final class Result {
        final String answer;
        final Exception failure;

        Result(String answer, Exception failure) {
            this.answer = answer;
            this.failure = failure;
        }
    }

    /** Handles a message of the runtime, and returns the answer. */
    String handle(Map<String, Object> message) {
        switch (Json.string(message, "event")) {
            case "before-checkpoint", "after-resume", "after-restore":
                break;
            default:
                return Participant.OK; // a dry run, or a word of a later version
        }
        String answer = offer(message);
        if (answer != null) {
            return answer;
        }
        Result result = tell(message);
        if (result.failure != null && !result.answer.equals(Participant.OK)) {
            // There is no caller to throw it at.
            System.err.print("crac: " + Json.string(message, "event") + ": ");
            result.failure.printStackTrace();
        }
        return result.answer;
    }

    /** Lets the thread that asked for this checkpoint tell the resources; null if there is none. */
    private synchronized String offer(Map<String, Object> message) {
        Request r = request;
        if (r == null) {
            return null;
        }
        long until = System.nanoTime() + ASKING_NANOS;
        while (r.asking && System.nanoTime() - until < 0) {
            await(10);
        }
        if (r.ended || !r.concerns(message)) {
            return null;
        }
        r.offered = message;
        notifyAll();
        while (r.answer == null && !r.ended) {
            await(0);
        }
        String answer = r.answer;
        r.answer = null;
        return answer;
    }

    /** Is told that the answer of handle has been sent, or could not be. */
    synchronized void delivered() {
        if (!inProgress && keepAlive != null) {
            keepAlive.end();
            keepAlive = null;
        }
        if (request != null) {
            request.delivered = true;
            notifyAll();
        }
    }

    /** See {@link Core#checkpointRestore()}. */
    void checkpointRestore() throws CheckpointException, RestoreException {
        if (Participant.DIR == null) {
            throw new UnsupportedOperationException("CRAC_DIR is not set: this is no container of the crac runtime, or its hooks are off");
        }
        Request r = new Request();
        synchronized (this) {
            if (inProgress || request != null) {
                throw refused("a checkpoint is under way: a recursive or second one is not possible");
            }
            request = r;
        }
        // What we wait for comes or fails by itself; channels do not survive interrupts.
        boolean interrupted = Thread.interrupted();
        try {
            Participant.awaitReady();
            ask(r);
            Exception failure = take(r);
            if (failure instanceof CheckpointException e) {
                throw e;
            }
            if (failure instanceof RestoreException e) {
                throw e;
            }
        } finally {
            synchronized (this) {
                request = null;
                r.ended = true;
                notifyAll();
            }
            if (interrupted) {
                Thread.currentThread().interrupt();
            }
        }
    }

    private void ask(Request r) throws CheckpointException {
        String error;
        try {
            Map<String, Object> answer = ControlSocket.ask("{\"v\":1,\"op\":\"checkpoint\"}", new ControlSocket.Progress() {
                @Override
                public void asking(boolean now) {
                    synchronized (Coordinator.this) {
                        r.asking = now;
                        Coordinator.this.notifyAll();
                    }
                }

                @Override
                public void answered(Map<String, Object> answer) {
                    synchronized (Coordinator.this) {
                        // Known before the listening thread goes on.
                        if (Boolean.TRUE.equals(answer.get("ok"))) {
                            r.id = Json.string(answer, "id");
                        }
                    }
                }
            });
            if (r.id != null) {
                return;
            }
            error = Json.string(answer, "error");
        } catch (IOException e) {
            error = e.getMessage();
        }
        throw refused(error);
    }

    /**
     * Waits until the image is there: the workload goes on before that, and whoever asked for the
     * checkpoint wants to use it.
     */
    private Exception stored(Request r) {
        while (true) {
            try {
                Map<String, Object> now = ControlSocket.ask(outcomeOf(r.id), null);
                switch (String.valueOf(Json.string(now, "outcome"))) {
                    case "pending":
                        sleep(POLL_MILLIS);
                        continue;
                    case "failed":
                        return refused(Json.string(now, "error"));
                    default:
                        return null;
                }
            } catch (IOException e) {
                return null; // there is nobody to ask
            }
        }
    }

    /** Waits for the end of a request's checkpoint, telling the resources on the way. */
    private Exception take(Request r) {
        while (true) {
            Map<String, Object> message;
            synchronized (this) {
                if (r.offered == null) {
                    await(POLL_MILLIS);
                }
                message = r.offered;
                r.offered = null;
                r.delivered = false;
            }
            if (message != null) {
                Result result = tell(message);
                boolean over = !Json.string(message, "event").equals("before-checkpoint");
                Thread.interrupted();
                synchronized (this) {
                    r.told = true;
                    r.answer = result.answer;
                    notifyAll();
                    // The program may end as soon as this returns.
                    while (over && !r.delivered) {
                        await(0);
                    }
                }
                if (over) {
                    boolean dumped = "checkpointed".equals(Json.string(message, "outcome"));
                    return dumped && result.failure == null ? stored(r) : result.failure;
                }
                continue;
            }
            if (r.told) {
                continue; // no connection of ours may be open while we are dumped
            }
            // Nobody has told us yet: it may have failed before that, or this
            // process may be none that can be told.
            try {
                Map<String, Object> now = ControlSocket.ask(outcomeOf(r.id), null);
                switch (String.valueOf(Json.string(now, "outcome"))) {
                    case "pending":
                        continue;
                    case "checkpointed", "restored":
                        if (waitsFor(r)) {
                            continue;
                        }
                        return null;
                    default:
                        if (waitsFor(r)) {
                            continue;
                        }
                        return refused(Json.string(now, "error"));
                }
            } catch (IOException e) {
                // during a dump nobody answers
            }
        }
    }

    /** Whether word has come in the meantime. */
    private synchronized boolean waitsFor(Request r) {
        if (r.offered == null) {
            await(POLL_MILLIS);
        }
        return r.offered != null;
    }

    private static String outcomeOf(String id) {
        StringBuilder s = new StringBuilder("{\"v\":1,\"op\":\"outcome\",\"wait_ms\":0,\"id\":");
        Json.quote(s, id);
        return s.append('}').toString();
    }

    /** Tells the resources, in the calling thread. */
    private Result tell(Map<String, Object> message) {
        String event = Json.string(message, "event");
        if (event.equals("before-checkpoint")) {
            return before();
        }
        return after(message, event.equals("after-restore"));
    }

    private Result before() {
        boolean unfinished;
        synchronized (this) {
            unfinished = inProgress;
            inProgress = true;
            vetoed = null;
            if (keepAlive == null) {
                keepAlive = new KeepAlive();
                keepAlive.start();
            }
        }
        if (unfinished) {
            // The runtime could not tell us how the last one ended.
            try {
                GlobalContext.INSTANCE.afterRestore(null);
            } catch (RestoreException e) {
                e.printStackTrace();
            }
        }
        try {
            GlobalContext.INSTANCE.beforeCheckpoint(null);
        } catch (CheckpointException e) {
            synchronized (this) {
                vetoed = e;
            }
            return new Result(Participant.refusal(Failures.text(e)), e);
        }
        Memory.giveBack();
        return new Result(Participant.OK, null);
    }

    private Result after(Map<String, Object> message, boolean restored) {
        RestoreException failed = new RestoreException();
        if (restored) {
            try {
                Start.restored(message);
            } catch (Throwable t) {
                Failures.add(failed, t);
            }
            try {
                Randomness.restored(Start.current().frozen());
            } catch (Throwable t) {
                Failures.add(failed, t);
            }
        }
        try {
            GlobalContext.INSTANCE.afterRestore(null);
        } catch (RestoreException e) {
            Failures.add(failed, e);
        }
        CheckpointException before;
        synchronized (this) {
            before = vetoed;
            vetoed = null;
            inProgress = false; // the JVM is kept alive until the runtime has the answer
        }
        boolean well = failed.getSuppressed().length == 0;
        String answer = well ? Participant.OK : Participant.refusal(Failures.text(failed));
        if (restored) {
            return new Result(answer, well ? null : failed);
        }
        // Still the original: whatever failed is no matter of a restore.
        CheckpointException all;
        if (Json.string(message, "outcome").equals("checkpointed")) {
            if (well) {
                return new Result(answer, null);
            }
            all = new CheckpointException("the checkpoint was made, but resources could not continue after it");
        } else {
            all = new CheckpointException(Json.string(message, "error"));
            if (before != null) {
                Failures.add(all, before);
            } else {
                // org.crac hands on what is suppressed, and not the message.
                all.addSuppressed(new IOException(all.getMessage()));
            }
        }
        for (Throwable t : failed.getSuppressed()) {
            all.addSuppressed(t);
        }
        return new Result(answer, all);
    }

    private static CheckpointException refused(String why) {
        CheckpointException e = new CheckpointException(why);
        e.addSuppressed(new IllegalStateException(why));
        return e;
    }

    /** Waits for a change, at most so long; 0 is for ever. Interrupts are of no concern here. */
    private void await(long millis) {
        try {
            wait(millis);
        } catch (InterruptedException e) {
            // cleared; what we wait for comes by itself
        }
    }

    static void sleep(long millis) {
        try {
            Thread.sleep(millis);
        } catch (InterruptedException e) {
            // as above
        }
    }

    /** Keeps the JVM from ending while servers are stopped whose threads are all that keeps it. */
    private static final class KeepAlive extends Thread {
        private boolean over;

        KeepAlive() {
            super(null, null, "crac-keep-alive", 0, false);
            setDaemon(false);
            setContextClassLoader(ClassLoader.getSystemClassLoader());
        }

        @Override
        public synchronized void run() {
            while (!over) {
                try {
                    wait();
                } catch (InterruptedException e) {
                    // not before it is over
                }
            }
        }

        synchronized void end() {
            over = true;
            notifyAll();
        }
    }
}

package io.github.cracshim;

import java.io.File;
import java.io.IOException;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

/** This process as the runtime sees it: a socket in $CRAC_DIR, and the thread that answers there. */
final class Participant implements Runnable {
    /** $CRAC_DIR, or null outside a container of the runtime or when its hooks are off. */
    static final File DIR = directory();

    private static final int MAX_MESSAGE = 1 << 20;
    private static final long IO_NANOS = TimeUnit.SECONDS.toNanos(10);

    private static Participant instance;

    private final CountDownLatch ready = new CountDownLatch(1);
    private volatile File socket;

    private Participant() {}

    private static File directory() {
        String dir = System.getenv("CRAC_DIR");
        return dir == null || dir.isEmpty() ? null : new File(dir);
    }

    /**
     * Starts to listen, once, without waiting for it; random generators that are made from now on are
     * followed. Does nothing where there is no directory to listen in.
     */
    static void start() {
        if (DIR != null) {
            begin();
            Randomness.install();
        }
    }

    /** The same, but nothing is done by the calling thread. */
    static void startInBackground() {
        if (DIR != null) {
            begin();
        }
    }

    private static synchronized void begin() {
        if (instance != null) {
            return;
        }
        instance = new Participant();
        // Without the thread locals and the class loader of whoever happens to be first.
        Thread t = new Thread(null, instance, "crac-participant", 0, false);
        t.setDaemon(true);
        t.setContextClassLoader(ClassLoader.getSystemClassLoader());
        t.start();
    }

    /** Waits until the runtime can reach this process, or it is clear that it cannot. */
    static void awaitReady() {
        boolean interrupted = false;
        for (int i = 0; i < 2; i++) {
            try {
                instance.ready.await(IO_NANOS, TimeUnit.NANOSECONDS);
                break;
            } catch (InterruptedException e) {
                interrupted = true;
            }
        }
        if (interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    @Override
    public void run() {
        Randomness.install();
        Runtime.getRuntime().addShutdownHook(new Thread(null, new Leave(), "crac-leave", 0, false));
        while (true) {
            try (ServerSocketChannel server = listen()) {
                ready.countDown();
                while (true) {
                    try (SocketChannel peer = server.accept()) {
                        answer(peer);
                    } catch (IOException e) {
                        // The peer has gone or never said a word; if it is the
                        // socket itself that is broken, make it anew.
                        if (!server.isOpen()) {
                            throw e;
                        }
                    } finally {
                        // Left by a resource; it would close the socket.
                        Thread.interrupted();
                    }
                }
            } catch (IOException | RuntimeException e) {
                if (ready.getCount() > 0) {
                    System.err.println("crac: this process takes no part in checkpoints: " + e + " (" + DIR + ")");
                    ready.countDown();
                    return;
                }
                Coordinator.sleep(100);
            }
        }
    }

    /** Removes the socket at the end of the process. */
    private final class Leave implements Runnable {
        @Override
        public void run() {
            File s = socket;
            if (s != null) {
                s.delete();
            }
        }
    }

    private ServerSocketChannel listen() throws IOException {
        String name = System.getenv("CRAC_NAME");
        File file = null;
        if (name != null && !name.isEmpty() && !name.startsWith(".") && name.indexOf('/') < 0 && !name.equals("control")) {
            file = new File(DIR, name + ".sock");
            if (answers(file)) {
                file = null; // the name is another process's, which inherited it with us
            }
        }
        if (file == null) {
            file = new File(DIR, "java-" + ProcessHandle.current().pid() + ".sock");
        }
        ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX);
        try {
            file.delete(); // left by an earlier process of the same id
            server.bind(UnixDomainSocketAddress.of(file.getPath()), 16);
        } catch (IOException | RuntimeException e) {
            server.close();
            throw e;
        }
        socket = file;
        return server;
    }

    private static boolean answers(File file) {
        try (SocketChannel c = SocketChannel.open(UnixDomainSocketAddress.of(file.getPath()))) {
            return c.isConnected();
        } catch (IOException | RuntimeException e) {
            return false;
        }
    }

    private static void answer(SocketChannel peer) throws IOException {
        String line = Line.read(peer, MAX_MESSAGE, System.nanoTime() + IO_NANOS);
        String answer;
        try {
            Map<String, Object> message = Json.object(line);
            answer = Coordinator.INSTANCE.handle(message);
        } catch (Json.SyntaxException e) {
            answer = refusal(e.getMessage());
        } catch (Throwable t) { // not even an Error may end this thread: nobody else answers
            answer = refusal(t.toString());
        }
        // The notification may have left it.
        Thread.interrupted();
        try {
            Line.write(peer, answer, System.nanoTime() + IO_NANOS);
        } finally {
            Coordinator.INSTANCE.delivered();
        }
    }

    /** The answer that all is well. */
    static final String OK = "{\"ok\":true}";

    /** The answer that something is not. */
    static String refusal(String error) {
        StringBuilder s = new StringBuilder("{\"ok\":false,\"error\":");
        Json.quote(s, error);
        return s.append('}').toString();
    }
}

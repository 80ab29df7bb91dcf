package io.github.cracshim;

import java.io.IOException;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.SocketChannel;
import java.io.File;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** Questions to the runtime. */
final class ControlSocket {
    private static final int MAX_ANSWER = 64 << 10;
    private static final long NANOS = TimeUnit.SECONDS.toNanos(10);

    private ControlSocket() {}

    /** Is told how far a question is. */
    interface Progress {
        /** The runtime has the question, until this is called with false. */
        void asking(boolean now);

        /** Is called before asking(false). */
        void answered(Map<String, Object> answer);
    }

    /**
     * Sends one line and returns the answer. While there is a dump nobody listens: so this tries
     * again for 10 s.
     *
     * @param progress may be null
     * @throws IOException if there is no answer; it names the socket
     */
    static Map<String, Object> ask(String question, Progress progress) throws IOException {
        File path = new File(Participant.DIR, "control.sock");
        long deadline = System.nanoTime() + NANOS;
        while (true) {
            try (SocketChannel c = SocketChannel.open(UnixDomainSocketAddress.of(path.getPath()))) {
                if (progress != null) {
                    progress.asking(true);
                }
                Line.write(c, question, deadline);
                Map<String, Object> answer = Json.object(Line.read(c, MAX_ANSWER, deadline));
                if (progress != null) {
                    progress.answered(answer);
                }
                return answer;
            } catch (Json.SyntaxException e) {
                throw new IOException("the runtime's answer at " + path + " is " + e.getMessage(), e);
            } catch (IOException e) {
                Thread.interrupted(); // its cause, perhaps; the next try is to be without
                if (System.nanoTime() - deadline > 0) {
                    throw new IOException("the runtime does not answer at " + path + ": " + e.getMessage(), e);
                }
            } finally {
                if (progress != null) {
                    progress.asking(false);
                }
            }
            Coordinator.sleep(20);
        }
    }
}

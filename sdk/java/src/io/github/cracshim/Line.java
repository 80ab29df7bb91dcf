package io.github.cracshim;

import java.io.EOFException;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;

/** Lines over a socket, bounded in length and time. */
final class Line {
    private Line() {}

    /**
     * Reads up to the first newline, which is left out.
     *
     * @param limit the most bytes
     * @param deadline a value of System.nanoTime
     * @throws EOFException if the peer closed without having sent a line
     * @throws IOException if the line is longer, or did not come in time
     */
    static String read(SocketChannel from, int limit, long deadline) throws IOException {
        // No timeout can be set on a blocking one, and a selector would be one
        // more descriptor in the dump.
        from.configureBlocking(false);
        ByteBuffer buf = ByteBuffer.allocate(4096);
        int seen = 0;
        while (true) {
            int n = from.read(buf);
            for (; seen < buf.position(); seen++) {
                if (buf.get(seen) == '\n') {
                    return new String(buf.array(), 0, seen, StandardCharsets.UTF_8);
                }
            }
            if (n < 0) {
                throw new EOFException("the peer closed the connection");
            }
            if (buf.position() >= limit) {
                throw new IOException("a line of more than " + limit + " bytes");
            }
            if (!buf.hasRemaining()) {
                ByteBuffer more = ByteBuffer.wrap(Arrays.copyOf(buf.array(), Math.min(limit, buf.capacity() * 4)));
                more.position(buf.position());
                buf = more;
            }
            if (n == 0) {
                pause(deadline, "no line");
            }
        }
    }

    /**
     * Writes line and a newline.
     *
     * @param deadline a value of System.nanoTime
     */
    static void write(SocketChannel to, String line, long deadline) throws IOException {
        to.configureBlocking(false);
        ByteBuffer buf = ByteBuffer.wrap((line + "\n").getBytes(StandardCharsets.UTF_8));
        while (true) {
            int n = to.write(buf);
            if (!buf.hasRemaining()) {
                return;
            }
            if (n == 0) {
                pause(deadline, "nobody reads");
            }
        }
    }

    private static void pause(long deadline, String what) throws IOException {
        if (System.nanoTime() - deadline > 0) {
            throw new IOException(what + " in time");
        }
        try {
            Thread.sleep(1);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            throw new IOException("interrupted", e);
        }
    }
}

package io.github.cracshim;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;

/**
 * What the running container was started with. A clone is not started by the request that its
 * program was started by: this is how the program learns of the new environment, which {@link
 * System#getenv()} does not show.
 *
 * <p>Immutable.
 */
public final class Start {
    private static volatile Start current;

    private final boolean restored;
    private final String generation;
    private final String container;
    private final String hostname;
    private final Map<String, String> env;
    private final List<String> args;
    private final Map<String, String> annotations;
    private final Duration frozen;

    /** A cold start. */
    private Start() {
        restored = false;
        generation = "";
        container = "";
        hostname = "";
        env = System.getenv();
        args = Collections.unmodifiableList(commandLine());
        annotations = Map.of();
        frozen = Duration.ZERO;
    }

    private Start(Map<String, Object> message) {
        restored = true;
        generation = Json.string(message, "generation");
        container = Json.string(message, "container");
        hostname = Json.string(message, "hostname");
        env = Collections.unmodifiableMap(Json.strings(message, "env"));
        args = Collections.unmodifiableList(Json.list(message, "args"));
        annotations = Collections.unmodifiableMap(Json.strings(message, "annotations"));
        frozen = Duration.ofNanos(Json.integer(message, "frozen_ns"));
    }

    /**
     * Returns the start of this process as it runs now.
     *
     * @return the last restore, or else the cold start
     */
    public static Start current() {
        Start s = current;
        if (s == null) {
            synchronized (Start.class) {
                s = current;
                if (s == null) {
                    current = s = new Start();
                }
            }
        }
        return s;
    }

    /** Takes over what a restore brings, and sets the system properties that it changes. */
    static void restored(Map<String, Object> message) {
        Start before = current();
        Start now = new Start(message);
        synchronized (Start.class) {
            current = now;
        }
        JavaOptions.apply(before, now);
    }

    /**
     * Tells whether this is a clone.
     *
     * @return false in a cold start, and in an original that goes on after its checkpoint
     */
    public boolean isRestored() {
        return restored;
    }

    /**
     * Returns what no other clone has.
     *
     * @return 32 hexadecimal digits; empty in a cold start
     */
    public String generation() {
        return generation;
    }

    /**
     * Returns the container's id.
     *
     * @return the id; empty in a cold start
     */
    public String container() {
        return container;
    }

    /**
     * Returns the container's host name.
     *
     * @return the name; empty in a cold start
     */
    public String hostname() {
        return hostname;
    }

    /**
     * Returns the environment that this start asks for.
     *
     * @return in a cold start the process's own; unmodifiable
     */
    public Map<String, String> env() {
        return env;
    }

    /**
     * Returns the arguments that this start asks for, the program first.
     *
     * @return in a cold start the process's own command line; unmodifiable
     */
    public List<String> args() {
        return args;
    }

    /**
     * Returns the container's annotations.
     *
     * @return empty in a cold start; unmodifiable
     */
    public Map<String, String> annotations() {
        return annotations;
    }

    /**
     * Returns the time between dump and restore.
     *
     * @return zero in a cold start
     */
    public Duration frozen() {
        return frozen;
    }

    private static List<String> commandLine() {
        List<String> words = new ArrayList<>();
        try {
            String all = new String(Files.readAllBytes(Path.of("/proc/self/cmdline")), StandardCharsets.UTF_8);
            for (int from = 0, to; (to = all.indexOf('\0', from)) >= 0; from = to + 1) {
                words.add(all.substring(from, to));
            }
        } catch (IOException e) {
            // no /proc: no arguments
        }
        return words;
    }
}

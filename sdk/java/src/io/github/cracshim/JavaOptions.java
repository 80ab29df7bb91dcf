package io.github.cracshim;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;

/**
 * The system properties that a start asks for by -Dname=value: in JAVA_TOOL_OPTIONS,
 * JDK_JAVA_OPTIONS, the command line and _JAVA_OPTIONS. A later one counts, as in a JVM's own start.
 */
final class JavaOptions {
    private JavaOptions() {}

    /** The launcher's options whose value is the next word. */
    private static final Set<String> WITH_VALUE = Set.of(
        "-cp", "-classpath", "--class-path", "-p", "--module-path", "--upgrade-module-path", "--add-modules",
        "--limit-modules", "--enable-native-access", "--add-exports", "--add-opens", "--add-reads", "--patch-module",
        "-d", "--describe-module", "--source");

    /**
     * Sets the system properties to which the new start gives another value than the old one. Those
     * that both give alike stay as the program may have changed them.
     */
    static void apply(Start before, Start now) {
        // The request's arguments are those of the container's first process.
        boolean args = ProcessHandle.current().pid() == 1;
        Map<String, String> old = properties(before.env(), args ? before.args() : List.of());
        for (Map.Entry<String, String> p : properties(now.env(), args ? now.args() : List.of()).entrySet()) {
            if (!p.getValue().equals(old.get(p.getKey()))) {
                System.setProperty(p.getKey(), p.getValue());
            }
        }
    }

    static Map<String, String> properties(Map<String, String> env, List<String> args) {
        Map<String, String> all = new LinkedHashMap<>();
        take(all, words(env.get("JAVA_TOOL_OPTIONS")));
        take(all, words(env.get("JDK_JAVA_OPTIONS")));
        if (!args.isEmpty() && args.get(0).substring(args.get(0).lastIndexOf('/') + 1).equals("java")) {
            take(all, options(args));
        }
        take(all, words(env.get("_JAVA_OPTIONS")));
        return all;
    }

    private static void take(Map<String, String> all, List<String> words) {
        for (String w : words) {
            if (w.startsWith("-D") && w.length() > 2) {
                int eq = w.indexOf('=');
                String name = eq < 0 ? w.substring(2) : w.substring(2, eq);
                if (!name.isEmpty()) {
                    all.put(name, eq < 0 ? "" : w.substring(eq + 1));
                }
            }
        }
    }

    /** The words of a command line that are the JVM's, and not the program's. */
    private static List<String> options(List<String> args) {
        List<String> own = new ArrayList<>();
        for (int i = 1; i < args.size(); i++) {
            String a = args.get(i);
            if (!a.startsWith("-") || a.equals("-jar") || a.equals("-m") || a.equals("--module") || a.startsWith("--module=")) {
                break;
            }
            own.add(a);
            if (WITH_VALUE.contains(a)) {
                i++;
            }
        }
        return own;
    }

    /** Splits as a JVM does: at white space that is not between quotes, which are left out. */
    static List<String> words(String text) {
        List<String> words = new ArrayList<>();
        if (text == null) {
            return words;
        }
        StringBuilder word = null;
        char quote = 0;
        for (int i = 0; i < text.length(); i++) {
            char c = text.charAt(i);
            if (quote == 0 && Character.isWhitespace(c)) {
                if (word != null) {
                    words.add(word.toString());
                    word = null;
                }
                continue;
            }
            if (word == null) {
                word = new StringBuilder();
            }
            if (quote != 0 && c == quote) {
                quote = 0;
            } else if (quote == 0 && (c == '"' || c == '\'')) {
                quote = c;
            } else {
                word.append(c);
            }
        }
        if (word != null) {
            words.add(word.toString());
        }
        return words;
    }
}

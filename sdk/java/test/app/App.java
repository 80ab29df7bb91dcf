import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.lang.ref.WeakReference;
import java.time.ZoneId;
import java.time.ZonedDateTime;
import java.time.zone.ZoneRulesException;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Map;
import java.util.MissingResourceException;
import java.util.ResourceBundle;
import java.util.Set;
import org.crac.Context;
import org.crac.Core;
import org.crac.Resource;

/**
 * A program written to org.crac that does what its standard input says, one line a command, and
 * tells on its standard output what happens to it.
 */
public final class App {
    private static final Map<String, R> resources = new HashMap<>();

    private App() {}

    private static synchronized void say(String line) {
        System.out.println(line);
        System.out.flush();
    }

    /** A resource whose name and words say how it behaves. */
    private static final class R implements Resource {
        final String name;
        final Set<String> words = new HashSet<>();

        R(String[] command) {
            name = command[1];
            for (int i = 2; i < command.length; i++) {
                words.add(command[i]);
            }
        }

        @Override
        public void beforeCheckpoint(Context<? extends Resource> context) throws Exception {
            say("before " + name + " in " + thread());
            if (words.contains("slow")) {
                Thread.sleep(1500);
            }
            if (words.contains("recursive")) {
                Core.checkpointRestore();
            }
            if (words.contains("registers")) {
                add(new R(new String[] {"register", name + "2"}));
            }
            if (words.contains("other-thread-registers")) {
                Thread t = new Thread(() -> {
                    add(new R(new String[] {"register", name + "2"}));
                    say("registered in the background");
                });
                t.start();
                // It must not get through now; Thread.join would show that it did.
                t.join(300);
                say(t.isAlive() ? "it waits" : "it got through");
            }
            if (words.contains("dropped")) {
                resources.remove(name);
            }
            if (words.contains("interrupts")) {
                throw new InterruptedException("interrupted");
            }
            if (words.contains("error")) {
                throw new AssertionError("no " + name);
            }
            if (words.contains("veto")) {
                throw new Exception("no " + name);
            }
        }

        @Override
        public void afterRestore(Context<? extends Resource> context) throws Exception {
            say("after " + name + " in " + thread());
            if (words.contains("broken")) {
                throw new Exception("broken " + name);
            }
        }

        private static String thread() {
            return Thread.currentThread().getName();
        }
    }

    private static void add(R r) {
        resources.put(r.name, r);
        Core.getGlobalContext().register(r);
    }

    public static void main(String[] args) throws Exception {
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = in.readLine()) != null; ) {
            String[] command = line.split(" ");
            switch (command[0]) {
                case "register" -> {
                    add(new R(command));
                    say("registered");
                }
                case "drop" -> {
                    WeakReference<R> weak = new WeakReference<>(resources.remove(command[1]));
                    for (int i = 0; i < 100 && weak.get() != null; i++) {
                        System.gc();
                        Thread.sleep(10);
                    }
                    say(weak.get() == null ? "dropped" : "still there");
                }
                case "interrupt" -> Thread.currentThread().interrupt();
                case "checkpoint" -> {
                    String result = "returned";
                    try {
                        Core.checkpointRestore();
                    } catch (Exception e) {
                        StringBuilder s = new StringBuilder(e.getClass().getSimpleName());
                        for (Throwable t : e.getSuppressed()) {
                            s.append(" | ").append(t.getClass().getSimpleName()).append(": ").append(t.getMessage());
                        }
                        result = s.toString();
                    }
                    say("checkpoint: " + result + (Thread.interrupted() ? " (interrupted)" : ""));
                }
                case "property" -> say(command[1] + "=" + System.getProperty(command[1]));
                case "set" -> {
                    System.setProperty(command[1], command[2]);
                    say("set");
                }
                case "start" -> {
                    io.github.cracshim.Start s = io.github.cracshim.Start.current();
                    say(s.isRestored() + " " + s.generation() + " " + s.container() + " " + s.hostname() + " " + s.env().get("DB") + " " + s.args() + " "
                        + s.annotations() + " " + s.frozen());
                }
                case "heap" -> {
                    byte[][] garbage = new byte[64][];
                    for (int i = 0; i < garbage.length; i++) {
                        garbage[i] = new byte[1 << 20];
                    }
                    garbage = null;
                    say("heap " + (Runtime.getRuntime().totalMemory() >> 20));
                }
                case "committed" -> say("heap " + (Runtime.getRuntime().totalMemory() >> 20));
                case "bundle" -> {
                    String found = "key=" + ResourceBundle.getBundle("bundle").getString("key");
                    try {
                        ResourceBundle.getBundle("missing");
                    } catch (MissingResourceException e) {
                        found += ", no bundle " + e.getClassName().replaceAll("_.*", "");
                    }
                    say("found: " + found);
                }
                case "zone" -> {
                    String found = ZonedDateTime.of(2026, 1, 1, 0, 0, 0, 0, ZoneId.of("Europe/Berlin")).getOffset().toString();
                    try {
                        ZoneId.of("Europe/Nowhere");
                    } catch (ZoneRulesException e) {
                        found += ", no zone Europe/Nowhere";
                    }
                    say("found: " + found);
                }
                case "end" -> {
                    say("main ends");
                    return;
                }
                default -> throw new IllegalArgumentException(line);
            }
        }
    }
}

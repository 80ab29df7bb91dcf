import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.security.SecureRandom;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Random;
import java.util.SplittableRandom;
import java.util.UUID;
import java.util.concurrent.ThreadLocalRandom;
import java.util.function.LongSupplier;
import java.util.function.Supplier;

/**
 * The drawing program of the test TestRandomness, and of TestJava. With the argument "sdk" it is
 * written to org.crac; only then it needs that library's classes.
 */
public final class Draw {
    private static final int EACH = 64;

    private Draw() {}

    public static void main(String[] args) throws Exception {
        boolean sdk = args.length > 0 && args[args.length - 1].equals("sdk");
        if (sdk) {
            Crac.register(); // before the generators are made
        }
        if (args.length > 0 && args[args.length - 1].equals("zones")) {
            say(java.time.ZonedDateTime.now(java.time.ZoneId.of("Europe/Berlin")).toString());
        }
        Map<String, Supplier<String>> kinds = kinds(sdk);
        draw(kinds);
        say("ready");
        while (true) {
            String[] command;
            try {
                command = Files.readString(Path.of("/ask")).strip().split(" ");
                Files.delete(Path.of("/ask"));
            } catch (NoSuchFileException e) {
                Thread.sleep(20);
                continue;
            }
            switch (command[0]) {
                case "draw" -> draw(kinds);
                case "env" -> say("env " + (sdk ? Crac.env("CRAC_TEST_CLONE") : System.getenv("CRAC_TEST_CLONE")));
                case "checkpoint" -> say("outcome " + Crac.checkpoint());
                case "property" -> say("property " + System.getProperty(command[1]));
                case "garbage" -> garbage();
                default -> throw new IllegalArgumentException(command[0]);
            }
            say("done");
        }
    }

    /** Leaves 64 MiB of it, that nothing holds: so not in the frame of main. */
    private static void garbage() {
        byte[][] all = new byte[64][];
        for (int i = 0; i < all.length; i++) {
            all[i] = new byte[1 << 20];
            new Random().nextBytes(all[i]);
        }
    }

    private static void say(String line) {
        System.out.println(line);
    }

    private static void draw(Map<String, Supplier<String>> kinds) {
        for (Map.Entry<String, Supplier<String>> k : kinds.entrySet()) {
            for (int i = 0; i < EACH; i++) {
                say("drew " + k.getKey() + " " + k.getValue().get());
            }
        }
    }

    private static Map<String, Supplier<String>> kinds(boolean sdk) throws Exception {
        Map<String, Supplier<String>> kinds = new LinkedHashMap<>();
        kinds.put("SecureRandom", secure(new SecureRandom()));
        kinds.put("SHA1PRNG", secure(SecureRandom.getInstance("SHA1PRNG")));
        kinds.put("DRBG", secure(SecureRandom.getInstance("DRBG")));
        kinds.put("strong", secure(SecureRandom.getInstanceStrong()));
        kinds.put("randomUUID", () -> UUID.randomUUID().toString());
        Random random = new Random();
        if (sdk) {
            Crac.reseed(random);
        }
        kinds.put("Random", plain(random::nextLong));
        kinds.put("ThreadLocalRandom", plain(() -> ThreadLocalRandom.current().nextLong()));
        kinds.put("SplittableRandom", plain(new SplittableRandom()::nextLong));
        kinds.put("Math.random", plain(() -> Double.doubleToLongBits(Math.random())));
        return kinds;
    }

    private static Supplier<String> plain(LongSupplier random) {
        return () -> Long.toHexString(random.getAsLong());
    }

    private static Supplier<String> secure(SecureRandom random) {
        return () -> {
            byte[] b = new byte[16];
            random.nextBytes(b);
            StringBuilder s = new StringBuilder();
            for (byte x : b) {
                s.append(Character.forDigit(x >> 4 & 0xf, 16)).append(Character.forDigit(x & 0xf, 16));
            }
            return s.toString();
        };
    }

    /** Apart, so that Draw can be loaded without these classes. */
    private static final class Crac implements org.crac.Resource {
        private static final Crac INSTANCE = new Crac();

        static void register() {
            org.crac.Core.getGlobalContext().register(INSTANCE);
        }

        static void reseed(Random random) {
            io.github.cracshim.Randomness.reseedAfterRestore(random);
        }

        static String env(String name) {
            return io.github.cracshim.Start.current().env().get(name);
        }

        static String checkpoint() throws IOException {
            try {
                org.crac.Core.checkpointRestore();
            } catch (Exception e) {
                StringBuilder s = new StringBuilder(e.getClass().getSimpleName());
                for (Throwable t : e.getSuppressed()) {
                    s.append(": ").append(t.getMessage());
                }
                return s.toString();
            }
            return io.github.cracshim.Start.current().isRestored() ? "restored" : "checkpointed";
        }

        @Override
        public void beforeCheckpoint(org.crac.Context<? extends org.crac.Resource> context) {
            say("before");
        }

        @Override
        public void afterRestore(org.crac.Context<? extends org.crac.Resource> context) {
            say("after " + System.getProperty("after", "-"));
        }
    }
}

package io.github.cracshim;

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.ObjectInputStream;
import java.io.ObjectOutputStream;
import java.lang.reflect.Method;
import java.security.DrbgParameters;
import java.security.SecureRandom;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;

/**
 * What can be tested without a runtime. Each method whose name begins with "test" is one; prints
 * "ok NAME" or "FAIL NAME" with the reason. Runs in the boot class path, as the library does.
 */
public final class UnitTest {
    private UnitTest() {}

    public static void main(String[] args) throws Exception {
        int failed = 0;
        for (Method m : UnitTest.class.getDeclaredMethods()) {
            if (!m.getName().startsWith("test")) {
                continue;
            }
            try {
                m.invoke(null);
                System.out.println("ok " + m.getName());
            } catch (java.lang.reflect.InvocationTargetException e) {
                failed++;
                System.out.println("FAIL " + m.getName() + " " + e.getCause());
                e.getCause().printStackTrace();
            }
        }
        System.out.flush();
        Runtime.getRuntime().halt(failed == 0 ? 0 : 1);
    }

    private static void equal(Object got, Object want) {
        if (!want.equals(got)) {
            throw new AssertionError("got " + got + ", want " + want);
        }
    }

    private static void check(boolean ok, String what) {
        if (!ok) {
            throw new AssertionError(what);
        }
    }

    static void testJsonValues() throws Exception {
        Map<String, Object> m = Json.object(
            " {\"s\":\"a\\n\\u00e4\\ud83d\\ude00\\\\\\\"\\/\" , \"n\":-12, \"big\":123456789012345678901, \"f\":1.5e3,"
                + "\"t\":true,\"x\":null,\"o\":{\"k\":\"v\",\"no\":1},\"l\":[\"a\",2,\"b\"],\"e\":{},\"el\":[], \"s2\":\"first\",\"s2\":\"last\"}\n");
        equal(Json.string(m, "s"), "a\n\u00e4\ud83d\ude00\\\"/");
        equal(Json.integer(m, "n"), -12L);
        equal(m.get("big"), 123456789012345678901.0);
        equal(m.get("f"), 1500.0);
        equal(m.get("t"), true);
        check(m.containsKey("x") && m.get("x") == null, "null is a value");
        equal(Json.strings(m, "o"), Map.of("k", "v"));
        equal(Json.list(m, "l"), List.of("a", "b"));
        equal(Json.string(m, "n"), "");
        equal(Json.string(m, "missing"), "");
        equal(Json.string(m, "s2"), "last");
    }

    static void testJsonRefuses() {
        String deep = "{\"a\":" + "[".repeat(100_000) + "]".repeat(100_000) + "}";
        for (String s : List.of("", " ", "[]", "\"x\"", "{", "{}x", "{\"a\"}", "{\"a\":}", "{a:1}", "{\"a\":01}", "{\"a\":1.}", "{\"a\":1,}",
                "{\"a\":-}", "{\"a\":tru}", "{\"a\":\"\u0001\"}", "{\"a\":\"\\x\"}", "{\"a\":\"\\u12g4\"}", "{\"a\":\"", "{\"a\":[1}", "\0{}", "{}\0", deep)) {
            try {
                Object got = Json.object(s);
                throw new AssertionError("read " + (s.length() > 50 ? "much" : s) + " as " + got);
            } catch (Json.SyntaxException e) {
                // as it should be
            }
        }
    }

    /** Mutates valid messages: whatever comes out is read or refused, and nothing else happens. */
    static void testJsonFuzz() throws Exception {
        Random random = new Random(1);
        String[] seeds = {
            "{\"v\":1,\"event\":\"after-restore\",\"env\":{\"K\":\"V\\u0041\"},\"args\":[\"a\",\"b\"],\"frozen_ns\":12.5e1}",
            "{\"ok\":false,\"error\":\"no \\\"\\\\ \\ud800\"}", "{\"a\":[[[{}]]],\"b\":[true,false,null,-0]}",
        };
        String alphabet = "{}[]\",:\\u0123456789abcdeftrnl.+-E \t\0\u00e9\ud83d";
        int read = 0;
        for (int i = 0; i < 50_000; i++) {
            StringBuilder s = new StringBuilder(seeds[i % seeds.length]);
            for (int n = random.nextInt(4); n >= 0; n--) {
                int at = random.nextInt(s.length());
                char c = alphabet.charAt(random.nextInt(alphabet.length()));
                switch (random.nextInt(3)) {
                    case 0 -> s.setCharAt(at, c);
                    case 1 -> s.insert(at, c);
                    default -> s.deleteCharAt(at);
                }
                if (s.length() == 0) {
                    s.append('{');
                }
            }
            try {
                Json.object(s.toString());
                read++;
            } catch (Json.SyntaxException e) {
                // not JSON any more
            }
        }
        check(read > 500, "only " + read + " of the mutants were JSON");
    }

    static void testJsonQuoteIsRead() throws Exception {
        Random random = new Random(2);
        for (int i = 0; i < 10_000; i++) {
            StringBuilder s = new StringBuilder();
            for (int n = random.nextInt(20); n > 0; n--) {
                s.append((char) (random.nextBoolean() ? random.nextInt(0x80) : random.nextInt(0x10000)));
            }
            StringBuilder quoted = new StringBuilder("{\"k\":");
            Json.quote(quoted, s.toString());
            String line = quoted.append('}').toString();
            check(line.indexOf('\n') < 0, "a newline in a line");
            // As it goes over the socket.
            byte[] utf8 = line.getBytes("UTF-8");
            equal(Json.string(Json.object(new String(utf8, "UTF-8")), "k"), s.toString());
        }
    }

    static void testWords() {
        equal(JavaOptions.words(null), List.of());
        equal(JavaOptions.words("  "), List.of());
        equal(JavaOptions.words(" -Da=1\t-Db=\"x y\" '-Dc=d e'f ''"), List.of("-Da=1", "-Db=x y", "-Dc=d ef", ""));
        equal(JavaOptions.words("-Da=\"it's\""), List.of("-Da=it's"));
        equal(JavaOptions.words("-Da=\"open end"), List.of("-Da=open end"));
    }

    static void testProperties() {
        Map<String, String> env = Map.of("JAVA_TOOL_OPTIONS", "-Da=tool -Db=tool -Xmx1g", "JDK_JAVA_OPTIONS", "-Db=jdk -Dc", "_JAVA_OPTIONS", "-De=last");
        equal(JavaOptions.properties(env, List.of("/usr/bin/java", "-Dc=args", "-cp", "-Dno=1", "-De=args", "-jar", "x.jar", "-Dno2=1")),
            Map.of("a", "tool", "b", "jdk", "c", "args", "e", "last"));
        equal(JavaOptions.properties(env, List.of("/bin/sh", "-Dc=args")), Map.of("a", "tool", "b", "jdk", "c", "", "e", "last"));
        equal(JavaOptions.properties(Map.of(), List.of("java", "Main", "-Dx=1")), Map.of());
        equal(JavaOptions.properties(Map.of("JAVA_TOOL_OPTIONS", "-D -D=x -Dy"), List.of()), Map.of("y", ""));
    }

    static void testContextOfItsOwn() throws Exception {
        List<String> events = new ArrayList<>();
        Resource inner = new Resource() {
            @Override
            public void beforeCheckpoint(Context<? extends Resource> context) throws Exception {
                events.add("inner");
                throw new Exception("no");
            }

            @Override
            public void afterRestore(Context<? extends Resource> context) {
                events.add("inner again");
            }
        };
        GlobalContext nested = new GlobalContext();
        GlobalContext outer = new GlobalContext();
        outer.register(nested);
        nested.register(inner);
        try {
            outer.beforeCheckpoint(null);
            throw new AssertionError("no exception");
        } catch (CheckpointException e) {
            equal(e.getSuppressed().length, 1);
            equal(e.getSuppressed()[0].getMessage(), "no"); // not wrapped twice
        }
        outer.afterRestore(null);
        equal(events, List.of("inner", "inner again"));
        try {
            outer.register(null);
            throw new AssertionError("registered null");
        } catch (NullPointerException e) {
            // as documented
        }
    }

    /** Resources that are equal, or whose hashCode does not work, are still different ones. */
    static void testResourcesByIdentity() throws Exception {
        List<Object> told = new ArrayList<>();
        final class Equal implements Resource {
            @Override
            public void beforeCheckpoint(Context<? extends Resource> context) {
                told.add(System.identityHashCode(this));
            }

            @Override
            public void afterRestore(Context<? extends Resource> context) {}

            @Override
            public boolean equals(Object o) {
                return o instanceof Equal;
            }

            @Override
            public int hashCode() {
                throw new IllegalStateException("asked");
            }
        }
        Equal a = new Equal();
        Equal b = new Equal();
        GlobalContext context = new GlobalContext();
        context.register(a);
        context.register(b);
        context.register(a); // is now the last one
        context.beforeCheckpoint(null);
        context.afterRestore(null);
        equal(told, List.of(System.identityHashCode(a), System.identityHashCode(b)));
    }

    static void testFailureText() {
        CheckpointException e = new CheckpointException();
        for (int i = 0; i < 1000; i++) {
            e.addSuppressed(new Exception("line one\nline two " + "x".repeat(100)));
        }
        String text = Failures.text(e);
        check(text.length() < 5000 && text.indexOf('\n') < 0, "too long, or lines: " + text.length());
        e = new CheckpointException();
        e.addSuppressed(new Exception() {
            private static final long serialVersionUID = 1L;

            @Override
            public String toString() {
                throw new IllegalStateException("broken");
            }
        });
        check(Failures.text(e).contains("UnitTest"), Failures.text(e));
    }

    /** A clone of a generator, as a dump would make it. */
    private static SecureRandom copy(SecureRandom r) throws Exception {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        try (ObjectOutputStream out = new ObjectOutputStream(bytes)) {
            out.writeObject(r);
        }
        try (ObjectInputStream in = new ObjectInputStream(new ByteArrayInputStream(bytes.toByteArray()))) {
            return (SecureRandom) in.readObject();
        }
    }

    private static byte[] draw(SecureRandom r) {
        byte[] b = new byte[16];
        r.nextBytes(b);
        return b;
    }

    static void testStatefulGeneratorsAreReseeded() throws Exception {
        SecureRandom registered = SecureRandom.getInstance("SHA1PRNG", "SUN");
        draw(registered);
        SecureRandom clone = copy(registered);
        Randomness.reseedAfterRestore(registered);
        Random plain = new Random(7);
        Randomness.reseedAfterRestore(plain);

        Randomness.install();
        Map<String, SecureRandom> followed = new HashMap<>();
        followed.put("SHA1PRNG", SecureRandom.getInstance("SHA1PRNG"));
        followed.put("DRBG", SecureRandom.getInstance("DRBG"));
        followed.put("strong DRBG", SecureRandom.getInstance("DRBG",
            DrbgParameters.instantiation(256, DrbgParameters.Capability.PR_AND_RESEED, "us".getBytes())));
        for (Map.Entry<String, SecureRandom> e : followed.entrySet()) {
            equal(e.getValue().getProvider().getName(), "CRaC");
            check(!Arrays.equals(draw(e.getValue()), draw(e.getValue())), e.getKey() + " repeats itself");
        }
        equal(followed.get("strong DRBG").getParameters().toString().contains("256"), true);
        followed.get("strong DRBG").reseed();
        check(!new SecureRandom().getProvider().getName().equals("CRaC"), "the default was replaced");

        SecureRandom repeatable = SecureRandom.getInstance("SHA1PRNG");
        repeatable.setSeed(42);
        SecureRandom same = SecureRandom.getInstance("SHA1PRNG");
        same.setSeed(42);
        equal(Arrays.toString(draw(repeatable)), Arrays.toString(draw(same)));

        equal(provider().followed().size(), 3); // the repeatable ones are not
        SecureRandom behind = null;
        for (SecureRandom r : provider().followed()) {
            behind = r.getAlgorithm().equals("SHA1PRNG") ? r : behind;
        }
        SecureRandom behindClone = copy(behind);

        Randomness.restored(Duration.ZERO);

        check(!Arrays.equals(draw(registered), draw(clone)), "a registered generator repeats in a clone");
        check(!Arrays.equals(draw(followed.get("SHA1PRNG")), draw(behindClone)), "a followed generator repeats in a clone");
        check(plain.nextLong() != new Random(7).nextLong(), "a plain generator repeats in a clone");
        equal(Arrays.toString(draw(repeatable)), Arrays.toString(draw(same)));
        java.lang.ref.Reference.reachabilityFence(followed);
    }

    private static ReseedingProvider provider() {
        return (ReseedingProvider) java.security.Security.getProvider("CRaC");
    }
}

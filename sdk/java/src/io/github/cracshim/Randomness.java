package io.github.cracshim;

import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.security.NoSuchAlgorithmException;
import java.security.Provider;
import java.security.SecureRandom;
import java.security.Security;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Objects;
import java.util.Random;
import java.util.Set;
import java.util.WeakHashMap;

/**
 * Sees to it that two clones of one dump do not draw the same random numbers.
 *
 * <p>Generators that keep a state are given a new seed after a restore, before any resource is told:
 * those registered here, and the SHA1PRNG and DRBG that the program made after this library was
 * first used. The default on Linux, NativePRNG, reads from the kernel; only what it has buffered is
 * thrown away.
 *
 * <p>Not reached: generators of other providers and those made before, unless they are registered;
 * {@link java.util.concurrent.ThreadLocalRandom} and {@link Math#random()}, which are no secure
 * ones.
 */
public final class Randomness {
    /** Weak keys; of identity, as generators have no other. */
    private static final Set<Random> registered = Collections.synchronizedSet(Collections.newSetFromMap(new WeakHashMap<>()));

    private static boolean installed;
    private static ReseedingProvider provider;

    private Randomness() {}

    /**
     * Gives a generator a new seed after every restore. For a {@link SecureRandom} the seed
     * supplements its state; another one starts anew from it.
     *
     * @param generator is held weakly
     * @throws NullPointerException if generator is null
     */
    public static void reseedAfterRestore(Random generator) {
        registered.add(Objects.requireNonNull(generator, "generator"));
        Participant.start();
    }

    /** Makes later generators known here. */
    static synchronized void install() {
        if (installed) {
            return;
        }
        installed = true;
        if (!Boolean.parseBoolean(System.getProperty("io.github.cracshim.random", "true"))) {
            return;
        }
        try {
            ReseedingProvider p = new ReseedingProvider();
            if (Security.insertProviderAt(p, 1) > 0) {
                provider = p;
            }
        } catch (Throwable t) {
            System.err.println("crac: random generators are not followed: " + t);
        }
    }

    /**
     * Gives new seeds, in a clone.
     *
     * @param frozen since when its state is that of other clones
     */
    static void restored(Duration frozen) throws IOException {
        List<Random> all;
        synchronized (registered) {
            all = new ArrayList<>(registered);
        }
        synchronized (Randomness.class) {
            if (provider != null) {
                all.addAll(provider.followed());
            }
        }
        try (InputStream kernel = new FileInputStream("/dev/urandom")) {
            for (Random r : all) {
                reseed(r, kernel);
            }
        }
        if (frozen.compareTo(BUFFERED) < 0) {
            discard("NativePRNG");
            discard("NativePRNGNonBlocking");
        }
    }

    private static void reseed(Random r, InputStream kernel) throws IOException {
        byte[] seed = kernel.readNBytes(r instanceof SecureRandom ? 48 : 8);
        if (r instanceof SecureRandom s) {
            s.setSeed(seed);
        } else {
            r.setSeed(ByteBuffer.wrap(seed).getLong());
        }
    }

    /**
     * Throws away what is left in the buffer that all generators of this kind share. By itself it is
     * used for 100 ms.
     */
    private static void discard(String algorithm) {
        Provider sun = Security.getProvider("SUN");
        if (sun == null || sun.getService("SecureRandom", algorithm) == null) {
            return;
        }
        try {
            SecureRandom.getInstance(algorithm, sun).nextBytes(new byte[MAX_BUFFER]);
        } catch (NoSuchAlgorithmException e) {
            // gone since
        }
    }

    /** Of sun.security.provider.NativePRNG. */
    private static final int MAX_BUFFER = 65536;

    /** No buffer lives as long; with some room for clocks that differ. */
    private static final Duration BUFFERED = Duration.ofSeconds(2);
}

package io.github.cracshim;

import java.security.NoSuchAlgorithmException;
import java.security.Provider;
import java.security.SecureRandom;
import java.security.SecureRandomParameters;
import java.security.SecureRandomSpi;
import java.security.Security;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.WeakHashMap;

/**
 * Hands out the generators of the providers behind it, and knows which live.
 *
 * <p>It offers only those that keep a state, and is the default only where the default is one of
 * them: {@code new SecureRandom()} asks a provider for what it lists, {@code getInstance} for what
 * {@link #getService} returns.
 */
final class ReseedingProvider extends Provider {
    private static final long serialVersionUID = 1L;
    private static final Set<String> STATEFUL = Set.of("SHA1PRNG", "DRBG");

    private final transient Map<Following, Boolean> followed = Collections.synchronizedMap(new WeakHashMap<>());

    ReseedingProvider() {
        super("CRaC", "1", "Random generators that get a new seed after a restore");
        String source = System.getProperty("java.security.egd", Security.getProperty("securerandom.source"));
        if (!"file:/dev/random".equals(source) && !"file:/dev/urandom".equals(source)) {
            // With another source, file:/dev/./urandom too, the default is no NativePRNG.
            String algorithm = new SecureRandom().getAlgorithm().toUpperCase(Locale.ROOT);
            Provider.Service s = STATEFUL.contains(algorithm) ? service(algorithm) : null;
            if (s != null) {
                putService(s);
            }
        }
    }

    @Override
    public Provider.Service getService(String type, String algorithm) {
        if (type.equalsIgnoreCase("SecureRandom")) {
            String name = algorithm.toUpperCase(Locale.ROOT);
            if (STATEFUL.contains(name)) {
                return service(name);
            }
        }
        return null;
    }

    @Override
    public String getProperty(String key) {
        // What SecureRandom asks, to know whether it must synchronize: that behind us does.
        if (key.startsWith("SecureRandom.") && key.endsWith(" ThreadSafe")) {
            return "true";
        }
        return super.getProperty(key);
    }

    /** Returns all generators that are to have a new seed. */
    List<SecureRandom> followed() {
        List<SecureRandom> all = new ArrayList<>();
        synchronized (followed) {
            for (Following f : followed.keySet()) {
                if (!f.repeatable) {
                    all.add(f.behind);
                }
            }
        }
        return all;
    }

    private Provider.Service service(String algorithm) {
        for (Provider p : Security.getProviders()) {
            if (p != this && p.getService("SecureRandom", algorithm) != null) {
                return new FollowingService(algorithm, p);
            }
        }
        return null;
    }

    private final class FollowingService extends Provider.Service {
        private final Provider behind;

        FollowingService(String algorithm, Provider behind) {
            super(ReseedingProvider.this, "SecureRandom", algorithm, Following.class.getName(), null, Map.of("ThreadSafe", "true"));
            this.behind = behind;
        }

        @Override
        public Object newInstance(Object parameters) throws NoSuchAlgorithmException {
            SecureRandom r = parameters == null
                ? SecureRandom.getInstance(getAlgorithm(), behind)
                : SecureRandom.getInstance(getAlgorithm(), (SecureRandomParameters) parameters, behind);
            Following f = new Following(r);
            followed.put(f, Boolean.TRUE);
            return f;
        }
    }

    /** A generator that is known here. */
    private static final class Following extends SecureRandomSpi {
        private static final long serialVersionUID = 1L;

        final SecureRandom behind;
        private volatile boolean drawn;

        /** Seeded by the program before it drew: SHA1PRNG then draws the same each time, as the program wants. */
        volatile boolean repeatable;

        Following(SecureRandom behind) {
            this.behind = behind;
        }

        @Override
        protected void engineSetSeed(byte[] seed) {
            if (!drawn && behind.getAlgorithm().equals("SHA1PRNG")) {
                repeatable = true;
            }
            behind.setSeed(seed);
        }

        @Override
        protected void engineNextBytes(byte[] bytes) {
            drawn = true;
            behind.nextBytes(bytes);
        }

        @Override
        protected void engineNextBytes(byte[] bytes, SecureRandomParameters parameters) {
            drawn = true;
            behind.nextBytes(bytes, parameters);
        }

        @Override
        protected byte[] engineGenerateSeed(int bytes) {
            return behind.generateSeed(bytes);
        }

        @Override
        protected void engineReseed(SecureRandomParameters parameters) {
            if (parameters == null) {
                behind.reseed();
            } else {
                behind.reseed(parameters);
            }
        }

        @Override
        protected SecureRandomParameters engineGetParameters() {
            return behind.getParameters();
        }

        @Override
        public String toString() {
            return behind.toString();
        }
    }
}

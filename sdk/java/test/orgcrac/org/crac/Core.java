package org.crac;

import java.lang.ref.WeakReference;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.lang.reflect.Proxy;
import java.util.Collections;
import java.util.Map;
import java.util.WeakHashMap;

/**
 * Stands in for the library org.crac, which is in no Debian suite and in no npm package. It asks the
 * same of the package that org.crac.Core.Compat names, as read in that library's source
 * (CRaC/org.crac at 028651d76bcf, version 1.5.1-SNAPSHOT): five classes by name, the static methods
 * checkpointRestore and getGlobalContext, and register(Resource) of the context, which is given a
 * java.lang.reflect.Proxy that lives as long as the program's resource and passes every call on; of a
 * failure, what is suppressed in it.
 *
 * Beyond that the library does without checkpointRestore where there is none, keeps what a failing
 * register throws for a later call, names its proxies, and has a CRaCMXBean, which looks for the one
 * of a JDK with CRaC and is not implemented without.
 */
public final class Core {
    private static final Bridge BRIDGE = Bridge.load(System.getProperty("org.crac.Core.Compat"));

    private Core() {}

    public static Context<Resource> getGlobalContext() {
        return Global.INSTANCE;
    }

    public static void checkpointRestore() throws CheckpointException, RestoreException {
        if (BRIDGE == null) {
            throw new UnsupportedOperationException();
        }
        BRIDGE.checkpointRestore();
    }

    private static final class Global extends Context<Resource> {
        static final Global INSTANCE = new Global();

        @Override
        public void register(Resource r) {
            if (BRIDGE != null) {
                BRIDGE.register(r);
            }
        }

        @Override
        public void beforeCheckpoint(Context<? extends Resource> context) {
            throw new IllegalStateException("nobody calls this");
        }

        @Override
        public void afterRestore(Context<? extends Resource> context) {
            throw new IllegalStateException("nobody calls this");
        }
    }

    private static final class Bridge {
        private final Class<?> resource;
        private final Class<?> checkpointException;
        private final Class<?> restoreException;
        private final Method checkpointRestore;
        private final Method register;
        private final Object context;
        private final Map<Resource, Object> proxies = Collections.synchronizedMap(new WeakHashMap<>());

        static Bridge load(String pkg) {
            try {
                return pkg == null ? null : new Bridge(pkg);
            } catch (ReflectiveOperationException e) {
                e.printStackTrace();
                return null;
            }
        }

        private Bridge(String pkg) throws ReflectiveOperationException {
            resource = Class.forName(pkg + ".Resource");
            checkpointException = Class.forName(pkg + ".CheckpointException");
            restoreException = Class.forName(pkg + ".RestoreException");
            checkpointRestore = Class.forName(pkg + ".Core").getMethod("checkpointRestore");
            context = Class.forName(pkg + ".Core").getMethod("getGlobalContext").invoke(null);
            // Newer versions ask the context instead.
            if (Class.forName(pkg + ".Context").getMethod("getGlobalContext").invoke(null) != context) {
                throw new NoSuchMethodException("two global contexts");
            }
            register = Class.forName(pkg + ".Context").getMethod("register", resource);
        }

        void register(Resource r) {
            WeakReference<Resource> weak = new WeakReference<>(r);
            Resource[] strong = new Resource[1]; // from before a checkpoint until after it
            Object proxy = Proxy.newProxyInstance(Core.class.getClassLoader(), new Class<?>[] {resource}, (p, m, args) -> {
                Resource now = weak.get();
                switch (m.getName()) {
                    case "beforeCheckpoint":
                        strong[0] = now;
                        if (now != null) {
                            now.beforeCheckpoint(Global.INSTANCE);
                        }
                        return null;
                    case "afterRestore":
                        strong[0] = null;
                        if (now != null) {
                            now.afterRestore(Global.INSTANCE);
                        }
                        return null;
                    default:
                        return m.invoke(now, args); // fails when it is collected
                }
            });
            proxies.put(r, proxy);
            try {
                register.invoke(context, proxy);
            } catch (IllegalAccessException | InvocationTargetException e) {
                throw new IllegalStateException(e);
            }
        }

        void checkpointRestore() throws CheckpointException, RestoreException {
            Throwable cause;
            try {
                checkpointRestore.invoke(null);
                return;
            } catch (InvocationTargetException e) {
                cause = e.getCause();
            } catch (IllegalAccessException e) {
                cause = e;
            }
            if (restoreException.isInstance(cause)) {
                RestoreException r = new RestoreException();
                for (Throwable t : cause.getSuppressed()) {
                    r.addSuppressed(t);
                }
                throw r;
            }
            CheckpointException c = new CheckpointException();
            if (checkpointException.isInstance(cause)) {
                for (Throwable t : cause.getSuppressed()) {
                    c.addSuppressed(t);
                }
            } else {
                c.addSuppressed(cause);
            }
            throw c;
        }
    }
}

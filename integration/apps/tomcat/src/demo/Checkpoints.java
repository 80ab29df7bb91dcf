package demo;

import io.github.cracshim.Context;
import io.github.cracshim.Core;
import io.github.cracshim.Resource;
import io.github.cracshim.Start;
import java.sql.SQLException;
import org.apache.catalina.Lifecycle;
import org.apache.catalina.LifecycleEvent;
import org.apache.catalina.LifecycleException;
import org.apache.catalina.LifecycleListener;
import org.apache.catalina.Server;
import org.apache.catalina.Service;
import org.apache.catalina.connector.Connector;

/**
 * Opens the pool when Tomcat starts. Where the runtime's Java library is there, it closes pool and
 * connectors before a checkpoint and opens them again after it, to the database that this start names.
 */
public final class Checkpoints implements LifecycleListener {
    private static Object hook; // the library holds it weakly

    @Override
    public void lifecycleEvent(LifecycleEvent event) {
        if (!event.getType().equals(Lifecycle.START_EVENT)) {
            return;
        }
        try {
            Pool.open(System.getenv("DB_URL"));
        } catch (SQLException e) {
            throw new IllegalStateException(e);
        }
        try {
            hook = Hook.register((Server) event.getSource());
        } catch (NoClassDefFoundError e) {
            System.out.println("no library, no hook: " + e.getMessage());
        }
    }

    /** Apart, so that this class can be loaded without the library. */
    private static final class Hook implements Resource {
        private final Server server;

        private Hook(Server server) {
            this.server = server;
        }

        static Hook register(Server server) {
            Hook h = new Hook(server);
            Core.getGlobalContext().register(h);
            return h;
        }

        @Override
        public void beforeCheckpoint(Context<? extends Resource> context) throws LifecycleException {
            for (Service s : server.findServices()) {
                for (Connector c : s.findConnectors()) {
                    c.stop();
                }
            }
            Pool.close();
        }

        @Override
        public void afterRestore(Context<? extends Resource> context) throws LifecycleException, SQLException {
            Pool.open(Start.current().env().get("DB_URL"));
            for (Service s : server.findServices()) {
                for (Connector c : s.findConnectors()) {
                    c.start();
                }
            }
        }
    }
}

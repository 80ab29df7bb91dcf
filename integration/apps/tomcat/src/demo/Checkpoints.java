package demo;

import java.io.IOException;
import java.net.InetAddress;
import java.net.Socket;
import java.sql.SQLException;
import org.apache.catalina.Lifecycle;
import org.apache.catalina.LifecycleEvent;
import org.apache.catalina.LifecycleException;
import org.apache.catalina.LifecycleListener;
import org.apache.catalina.Server;
import org.apache.catalina.Service;
import org.apache.catalina.connector.Connector;
import org.crac.Context;
import org.crac.Core;
import org.crac.Resource;

/**
 * Opens the pool when Tomcat starts. Where there is something behind org.crac, such as the runtime's Java
 * library, it closes connectors and pool before a checkpoint and opens them again after it, to the
 * database that this start names. It is written to org.crac alone.
 */
public final class Checkpoints implements LifecycleListener, Resource {
    private static int closed;
    private static int opened;

    private Server server; // which has this listener: org.crac holds it weakly

    @Override
    public void lifecycleEvent(LifecycleEvent event) {
        if (!event.getType().equals(Lifecycle.START_EVENT)) {
            return;
        }
        server = (Server) event.getSource();
        try {
            openPool();
        } catch (SQLException e) {
            throw new IllegalStateException(e);
        }
        Core.getGlobalContext().register(this);
    }

    private static void openPool() throws SQLException {
        Pool.open(System.getProperty("demo.database"));
    }

    @Override
    public void beforeCheckpoint(Context<? extends Resource> context) throws LifecycleException {
        for (Service s : server.findServices()) {
            for (Connector c : s.findConnectors()) {
                c.stop();
                if (listens(c.getPort())) {
                    throw new IllegalStateException("the connector is stopped, and listens");
                }
                closed++;
            }
        }
        Pool.close();
    }

    @Override
    public void afterRestore(Context<? extends Resource> context) throws LifecycleException, SQLException {
        openPool();
        for (Service s : server.findServices()) {
            for (Connector c : s.findConnectors()) {
                c.start();
                if (!listens(c.getPort())) {
                    throw new IllegalStateException("the connector is started, and does not listen");
                }
                opened++;
            }
        }
    }

    private static boolean listens(int port) {
        try (Socket s = new Socket(InetAddress.getLoopbackAddress(), port)) {
            return s.isConnected();
        } catch (IOException e) {
            return false;
        }
    }

    /** How often connectors were closed and opened again, with a look at their ports. */
    static String connectors() {
        return "closed=" + closed + "\nreopened=" + opened;
    }
}

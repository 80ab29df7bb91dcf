package demo;

import java.sql.Connection;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.UUID;
import org.apache.tomcat.jdbc.pool.DataSource;
import org.apache.tomcat.jdbc.pool.PoolProperties;

/** The pool of connections that all requests share. */
public final class Pool {
    private static final UUID INSTANCE = UUID.randomUUID();
    private static final int SIZE = 4;

    private static DataSource source;
    private static int opened;

    private Pool() {}

    /** Opens the pool with all its connections. */
    static synchronized void open(String url) throws SQLException {
        PoolProperties p = new PoolProperties();
        p.setDriverClassName("org.postgresql.Driver");
        p.setUrl(url);
        p.setUsername("postgres");
        p.setInitialSize(SIZE);
        p.setMinIdle(SIZE);
        p.setMaxActive(SIZE);
        source = new DataSource(p);
        source.createPool();
        opened++;
    }

    static synchronized void close() {
        source.close(true);
    }

    /** Asks the database which of its processes serves this connection. */
    public static synchronized String query() {
        String answer;
        try (Connection c = source.getConnection();
                Statement s = c.createStatement();
                ResultSet r = s.executeQuery("select pg_backend_pid()")) {
            r.next();
            answer = "backend=" + r.getInt(1);
        } catch (SQLException e) {
            answer = "error=" + e.getMessage().replace('\n', ' ');
        }
        return answer + "\nopened=" + opened + "\n" + Checkpoints.connectors() + "\ninstance=" + INSTANCE + "\n";
    }
}

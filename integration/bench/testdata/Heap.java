import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.Random;
import java.util.UUID;
import java.util.zip.CRC32;

/** A service whose heap holds as many MiB of random numbers as its argument says. */
public class Heap {
    public static void main(String[] args) throws Exception {
        String id = UUID.randomUUID().toString();
        Random random = new Random();
        byte[][] blocks = new byte[Integer.parseInt(args[0]) * 16][1 << 16];
        for (byte[] block : blocks) {
            random.nextBytes(block);
        }
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.createContext("/", exchange -> {
            String text = id;
            if (exchange.getRequestURI().getPath().equals("/sum")) {
                CRC32 sum = new CRC32();
                for (byte[] block : blocks) {
                    sum.update(block);
                }
                text = Long.toHexString(sum.getValue());
            }
            byte[] answer = text.getBytes();
            exchange.getResponseHeaders().set("Connection", "close");
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
    }
}

<%--
  What a checkpoint must keep: memory of the program (a static counter and when it
  was born), of one client (a session attribute), and a file. Each request adds one
  to all three and says, one key=value a line, what it found before and what is now.
--%><%@ page contentType="text/plain; charset=UTF-8" trimDirectiveWhitespaces="true" session="true"
      import="java.nio.file.*, java.util.UUID" %><%!
  private static final UUID INSTANCE = UUID.randomUUID();
  private static final Path FILE = Path.of("/var/lib/crac-demo/state.txt");
  private static int hits;

  private static synchronized String hit() throws java.io.IOException {
    hits++;
    String before = Files.exists(FILE) ? Files.readString(FILE).strip() : "0";
    Files.writeString(FILE, hits + "\n");
    // Not InetAddress: it remembers the name of the host that it was first asked on.
    String hostname = Files.readString(Path.of("/proc/sys/kernel/hostname")).strip();
    return "hits=" + hits + "\nfile_before=" + before + "\nfile=" + Files.readString(FILE).strip()
        + "\ninstance=" + INSTANCE + "\nhostname=" + hostname + "\npid=" + ProcessHandle.current().pid() + "\n";
  }
%><%
  Integer n = (Integer) session.getAttribute("hits");
  n = n == null ? 1 : n + 1;
  session.setAttribute("hits", n);
  out.print(hit() + "session_hits=" + n + "\nsession=" + session.getId() + "\nsession_new=" + session.isNew() + "\n");
%>

<%--
  Asks the database by a connection of the pool. One key=value a line: what the database answered or
  why it did not, and whether this is the program that was checkpointed.
--%><%@ page contentType="text/plain; charset=UTF-8" trimDirectiveWhitespaces="true" session="false" %><%
  out.print(demo.Pool.query());
%>

package io.github.cracshim;

/** Gathers what resources threw. */
final class Failures {
    private Failures() {}

    /** More than anyone reads, and far from the 64 KiB that an answer may have. */
    private static final int MAX_TEXT = 4096;

    /**
     * Adds what a resource threw. A nested context's exception that says nothing itself is
     * replaced by those that it gathered.
     */
    static void add(Exception to, Throwable t) {
        if (t instanceof InterruptedException) {
            Thread.currentThread().interrupt();
        }
        Throwable[] nested = t.getSuppressed();
        if (t.getClass() == to.getClass() && t.getMessage() == null && nested.length > 0) {
            for (Throwable n : nested) {
                to.addSuppressed(n);
            }
        } else if (t != to) {
            to.addSuppressed(t);
        }
    }

    /** Puts what was gathered on one line. */
    static String text(Exception gathered) {
        StringBuilder s = new StringBuilder();
        for (Throwable t : gathered.getSuppressed()) {
            if (s.length() > MAX_TEXT) {
                break;
            }
            if (s.length() > 0) {
                s.append("; ");
            }
            s.append(describe(t));
        }
        if (s.length() == 0) {
            s.append(describe(gathered));
        }
        if (s.length() > MAX_TEXT) {
            s.setLength(MAX_TEXT);
            s.append('…');
        }
        return s.toString();
    }

    /** An exception's text may come from a program's own code, which may throw. */
    private static String describe(Throwable t) {
        try {
            return String.valueOf(t).replace('\n', ' ').replace('\r', ' ');
        } catch (Throwable broken) {
            return t.getClass().getName();
        }
    }
}

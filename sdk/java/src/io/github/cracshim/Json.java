package io.github.cracshim;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * As much of JSON (RFC 8259) as the protocol needs: objects are maps in their order, arrays lists,
 * numbers Long or Double; of equal keys the last one counts.
 */
final class Json {
    /** Deeper than any message; bounds the stack. */
    private static final int MAX_DEPTH = 32;

    private final String text;
    private int at;

    private Json(String text) {
        this.text = text;
    }

    /** What was read is not JSON. */
    static final class SyntaxException extends Exception {
        private static final long serialVersionUID = 1L;

        SyntaxException(String message) {
            super(message);
        }
    }

    /**
     * Reads an object.
     *
     * @throws SyntaxException if text is anything else; it names the place
     */
    static Map<String, Object> object(String text) throws SyntaxException {
        Json j = new Json(text);
        j.space();
        if (j.peek() != '{') {
            throw j.error("an object");
        }
        Map<String, Object> m = j.readObject(0);
        j.space();
        if (j.at < text.length()) {
            throw j.error("the end");
        }
        return m;
    }

    /** Appends s as a JSON string. */
    static void quote(StringBuilder to, String s) {
        to.append('"');
        for (int i = 0; i < s.length(); i++) {
            char c = s.charAt(i);
            boolean alone = Character.isHighSurrogate(c) && (i + 1 == s.length() || !Character.isLowSurrogate(s.charAt(i + 1)))
                || Character.isLowSurrogate(c) && (i == 0 || !Character.isHighSurrogate(s.charAt(i - 1)));
            if (c == '"' || c == '\\') {
                to.append('\\').append(c);
            } else if (c < 0x20 || c == 0x7f || alone) {
                to.append("\\u");
                for (int shift = 12; shift >= 0; shift -= 4) {
                    to.append(Character.forDigit(c >> shift & 0xf, 16));
                }
            } else {
                to.append(c);
            }
        }
        to.append('"');
    }

    /** Returns the string at key, or "" if there is none. */
    static String string(Map<String, Object> object, String key) {
        return object.get(key) instanceof String s ? s : "";
    }

    /** Returns the integer at key, or 0 if there is none. */
    static long integer(Map<String, Object> object, String key) {
        return object.get(key) instanceof Long n ? n : 0;
    }

    /** Returns the strings of the object at key; what is no string is left out. */
    static Map<String, String> strings(Map<String, Object> object, String key) {
        Map<String, String> all = new LinkedHashMap<>();
        if (object.get(key) instanceof Map<?, ?> m) {
            for (Map.Entry<?, ?> e : m.entrySet()) {
                if (e.getValue() instanceof String v) {
                    all.put((String) e.getKey(), v);
                }
            }
        }
        return all;
    }

    /** Returns the strings of the array at key; what is no string is left out. */
    static List<String> list(Map<String, Object> object, String key) {
        List<String> all = new ArrayList<>();
        if (object.get(key) instanceof List<?> l) {
            for (Object o : l) {
                if (o instanceof String s) {
                    all.add(s);
                }
            }
        }
        return all;
    }

    private Object value(int depth) throws SyntaxException {
        if (depth > MAX_DEPTH) {
            throw error("less nesting");
        }
        switch (peek()) {
            case '{':
                return readObject(depth);
            case '[':
                return readArray(depth);
            case '"':
                return readString();
            case 't':
                return word("true", Boolean.TRUE);
            case 'f':
                return word("false", Boolean.FALSE);
            case 'n':
                return word("null", null);
            default:
                return readNumber();
        }
    }

    private Map<String, Object> readObject(int depth) throws SyntaxException {
        Map<String, Object> m = new LinkedHashMap<>();
        at++;
        space();
        if (peek() == '}') {
            at++;
            return m;
        }
        while (true) {
            space();
            if (peek() != '"') {
                throw error("a key");
            }
            String key = readString();
            space();
            expect(':');
            space();
            m.put(key, value(depth + 1));
            space();
            if (peek() == '}') {
                at++;
                return m;
            }
            expect(',');
        }
    }

    private List<Object> readArray(int depth) throws SyntaxException {
        List<Object> l = new ArrayList<>();
        at++;
        space();
        if (peek() == ']') {
            at++;
            return l;
        }
        while (true) {
            space();
            l.add(value(depth + 1));
            space();
            if (peek() == ']') {
                at++;
                return l;
            }
            expect(',');
        }
    }

    private String readString() throws SyntaxException {
        StringBuilder s = new StringBuilder();
        at++;
        while (true) {
            char c = next();
            if (c == '"') {
                return s.toString();
            }
            if (c < 0x20) {
                at--;
                throw error("no control character");
            }
            if (c != '\\') {
                s.append(c);
                continue;
            }
            c = next();
            switch (c) {
                case '"', '\\', '/' -> s.append(c);
                case 'b' -> s.append('\b');
                case 'f' -> s.append('\f');
                case 'n' -> s.append('\n');
                case 'r' -> s.append('\r');
                case 't' -> s.append('\t');
                case 'u' -> {
                    int code = 0;
                    for (int i = 0; i < 4; i++) {
                        char h = next();
                        int digit = h < 0x80 ? Character.digit(h, 16) : -1;
                        if (digit < 0) {
                            at--;
                            throw error("a hexadecimal digit");
                        }
                        code = code << 4 | digit;
                    }
                    s.append((char) code);
                }
                default -> {
                    at--;
                    throw error("an escape");
                }
            }
        }
    }

    private Object readNumber() throws SyntaxException {
        int from = at;
        if (peek() == '-') {
            at++;
        }
        if (peek() == '0') {
            at++;
        } else {
            digits();
        }
        boolean whole = true;
        if (peek() == '.') {
            whole = false;
            at++;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            whole = false;
            at++;
            if (peek() == '+' || peek() == '-') {
                at++;
            }
            digits();
        }
        String number = text.substring(from, at);
        if (whole) {
            try {
                return Long.valueOf(number);
            } catch (NumberFormatException e) {
                // beyond 64 bits
            }
        }
        return Double.valueOf(number);
    }

    private void digits() throws SyntaxException {
        int from = at;
        while (peek() >= '0' && peek() <= '9') {
            at++;
        }
        if (at == from) {
            throw error("a value");
        }
    }

    private Object word(String word, Object value) throws SyntaxException {
        if (!text.startsWith(word, at)) {
            throw error("a value");
        }
        at += word.length();
        return value;
    }

    private void space() {
        while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') {
            at++;
        }
    }

    /** Returns NUL at the end; it is part of no JSON. */
    private char peek() {
        return at < text.length() ? text.charAt(at) : 0;
    }

    private char next() throws SyntaxException {
        if (at >= text.length()) {
            throw error("more");
        }
        return text.charAt(at++);
    }

    private void expect(char c) throws SyntaxException {
        if (peek() != c) {
            throw error(String.valueOf(c));
        }
        at++;
    }

    private SyntaxException error(String wanted) {
        return new SyntaxException("no JSON: at character " + at + " there should be " + wanted);
    }
}

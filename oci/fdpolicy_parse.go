package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
)

// What a policy may hold: it may come with an image, from anybody.
const (
	MaxFDPolicy  = 64 << 10 // bytes
	maxFDRules   = 256
	maxFDPattern = 20_000 // instructions of all patterns of a policy together
)

// fdPolicyFile, before a path, says that the policy is a file of the image.
const fdPolicyFile = "file:"

// FDPolicyPath tells whether an fd-policy option names a file of the image, and
// which.
func FDPolicyPath(option string) (name string, ok bool) {
	return strings.CutPrefix(option, fdPolicyFile)
}

// checkFDPolicy tells whether the option can be meant.
func checkFDPolicy(option string) error {
	name, ok := FDPolicyPath(option)
	if !ok {
		_, err := ParseFDPolicy([]byte(option))
		return err
	}
	if !path.IsAbs(name) || path.Clean(name) != name || strings.ContainsRune(name, 0) {
		return fmt.Errorf("%q is not the absolute, clean path of a file in the image", name)
	}
	return nil
}

// fdField is one `key: value` of a rule.
type fdField struct {
	key, value string
	line       int
}

// ParseFDPolicy reads a policy, in either of two forms. Lines of `key: value`
// are CRaC's: rules are separated by lines of three dashes (or begin with a dash,
// as the items of a YAML list do); a # at the beginning of a line or after a
// space begins a comment; values may be quoted as in YAML. They are not read with
// a YAML parser, because YAML takes the unquoted globs of CRaC's own examples
// (path: **/*.log) for aliases. JSON is a list of objects with the same keys, or
// one such object.
//
// Keys, types, actions and families are known in any case of letters. What is
// not known is an error that names the line and lists what is.
func ParseFDPolicy(data []byte) (FDPolicy, error) {
	if len(data) > MaxFDPolicy {
		return FDPolicy{}, fmt.Errorf("the policy has %d bytes; at most %d are read", len(data), MaxFDPolicy)
	}
	read := fdRulesOfLines
	if text := bytes.TrimSpace(data); len(text) > 0 && (text[0] == '{' || text[0] == '[') {
		read = fdRulesOfJSON
	}
	rules, err := read(data)
	if err != nil {
		return FDPolicy{}, err
	}
	if len(rules) == 0 {
		return FDPolicy{}, errors.New("the policy has no rule; one is such as `type: socket` and `action: close` on lines of their own")
	}
	if len(rules) > maxFDRules {
		return FDPolicy{}, fmt.Errorf("the policy has %d rules; at most %d are read", len(rules), maxFDRules)
	}
	p := FDPolicy{Rules: make([]FDRule, len(rules))}
	budget := maxFDPattern
	for i, fields := range rules {
		if p.Rules[i], err = newFDRule(i+1, fields, &budget); err != nil {
			return FDPolicy{}, err
		}
	}
	return p, nil
}

func fdRulesOfLines(data []byte) (rules [][]fdField, err error) {
	var rule []fdField
	end := func() {
		if len(rule) > 0 {
			rules, rule = append(rules, rule), nil
		}
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		text := strings.TrimSpace(line)
		if text == "" || text[0] == '#' {
			continue
		}
		if text == "---" {
			end()
			continue
		}
		if item, ok := strings.CutPrefix(text, "- "); ok {
			end()
			text = strings.TrimSpace(item)
		}
		key, value, ok := strings.Cut(text, ":")
		if !ok || value != "" && value[0] != ' ' && value[0] != '\t' {
			return nil, fmt.Errorf("line %d: %q is neither `key: value`, with a space after the colon, nor ---", n, text)
		}
		if value, err = fdValue(strings.TrimSpace(value)); err != nil {
			return nil, fmt.Errorf("line %d: %s: %w", n, key, err)
		}
		rule = append(rule, fdField{strings.TrimSpace(key), value, n})
	}
	end()
	return rules, nil
}

// fdValue takes quotes and a comment off a value.
func fdValue(text string) (string, error) {
	if text == "" || text[0] != '"' && text[0] != '\'' {
		if text != "" && text[0] == '#' {
			return "", nil
		}
		for i := 1; i < len(text); i++ {
			if text[i] == '#' && (text[i-1] == ' ' || text[i-1] == '\t') {
				return strings.TrimSpace(text[:i]), nil
			}
		}
		return text, nil
	}
	var rest, value string
	if text[0] == '"' {
		quoted, err := strconv.QuotedPrefix(text)
		if err == nil {
			value, err = strconv.Unquote(quoted)
		}
		if err != nil {
			return "", fmt.Errorf("%s is not well quoted", text)
		}
		rest = text[len(quoted):]
	} else {
		var b strings.Builder
		rest = text[1:]
		for {
			part, after, ok := strings.Cut(rest, "'")
			if !ok {
				return "", fmt.Errorf("%s is not well quoted", text)
			}
			b.WriteString(part)
			if rest, ok = strings.CutPrefix(after, "'"); !ok {
				rest = after
				break
			}
			b.WriteByte('\'') // two stand for one
		}
		value = b.String()
	}
	if rest = strings.TrimSpace(rest); rest != "" && rest[0] != '#' {
		return "", fmt.Errorf("%q stands after the end of the quotes", rest)
	}
	return value, nil
}

// fdRulesOfJSON reads token by token: keys that come twice are an error, and
// every rule knows its line.
func fdRulesOfJSON(data []byte) (rules [][]fdField, err error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	line := func() int { return 1 + bytes.Count(data[:dec.InputOffset()], []byte{'\n'}) }
	next := func() (json.Token, error) {
		t, err := dec.Token()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			err = fmt.Errorf("line %d: JSON: %w", line(), err)
		}
		return t, err
	}
	object := func() (rule []fdField, err error) { // after its brace
		rule = []fdField{}
		for {
			key, err := next()
			if err != nil || key == json.Delim('}') {
				return rule, err
			}
			value, err := next()
			if err != nil {
				return nil, err
			}
			f := fdField{key: key.(string), line: line()}
			switch v := value.(type) {
			case string:
				f.value = v
			case json.Number:
				f.value = v.String()
			case bool:
				f.value = strconv.FormatBool(v)
			default:
				return nil, fmt.Errorf("line %d: %s: %v is neither a string nor a number nor true or false", f.line, f.key, v)
			}
			rule = append(rule, f)
		}
	}
	first, err := next()
	if err != nil {
		return nil, err
	}
	if first == json.Delim('{') {
		rule, err := object()
		if err != nil {
			return nil, err
		}
		rules = append(rules, rule)
	} else {
		for {
			t, err := next()
			if err != nil {
				return nil, err
			}
			if t == json.Delim(']') {
				break
			}
			if t != json.Delim('{') {
				return nil, fmt.Errorf("line %d: %v is no object; a policy is a list of objects with `type` and `action`", line(), t)
			}
			rule, err := object()
			if err != nil {
				return nil, err
			}
			rules = append(rules, rule)
		}
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("line %d: something stands after the end of the JSON", line())
	}
	return rules, nil
}

func fdTypes() []FDType { return []FDType{FDFile, FDPipe, FDSocket, FDOther} }

// fdKeys are the keys of a type; without one, those of all.
func fdKeys(t FDType) []string {
	keys := []string{"type", "action", "warn"}
	if t == FDFile || t == "" {
		keys = append(keys, "path")
	}
	if t == FDSocket || t == "" {
		keys = append(keys, "family", "localAddress", "localPort", "remoteAddress", "remotePort", "localPath", "remotePath", "listening")
	}
	if t == FDOther || t == "" {
		keys = append(keys, "value", "regex")
	}
	return keys
}

// The actions of each type: CRaC's.
func fdActions(t FDType) []string {
	all := []string{string(FDError), string(FDIgnore), string(FDClose)}
	if t == FDFile || t == FDSocket {
		all = append(all, string(FDReopen))
	}
	return all
}

// newFDRule checks the fields of one rule.
func newFDRule(number int, fields []fdField, budget *int) (FDRule, error) {
	r := FDRule{Number: number, Line: 1, Warn: true, Value: -1}
	if len(fields) > 0 {
		r.Line = fields[0].line
	}
	fail := func(line int, format string, a ...any) (FDRule, error) {
		return FDRule{}, fmt.Errorf("line %d (rule %d): %s", line, number, fmt.Sprintf(format, a...))
	}
	given := make(map[string]fdField)
	for _, f := range fields {
		key := strings.ToLower(f.key)
		if first, ok := given[key]; ok {
			return fail(f.line, "%s was given on line %d; begin another rule with a line of ---", f.key, first.line)
		}
		if f.value == "" {
			return fail(f.line, "%s has no value", f.key)
		}
		given[key] = f
	}

	// A mistyped key is the likelier reason for one that is missing.
	kind, ok := given["type"]
	r.Type = FDType(strings.ToLower(kind.value))
	if ok && !slices.Contains(fdTypes(), r.Type) {
		return fail(kind.line, "unknown type %q; known are file, pipe, socket and filedescriptor", kind.value)
	}
	keys := fdKeys(r.Type)
	names := make([]string, len(fields))
	for i, f := range fields {
		at := slices.IndexFunc(keys, func(k string) bool { return strings.EqualFold(k, f.key) })
		if at < 0 && ok {
			return fail(f.line, "unknown key %q; for the type %s there are %s", f.key, r.Type, strings.Join(keys, ", "))
		}
		if at < 0 {
			return fail(f.line, "unknown key %q; known are %s", f.key, strings.Join(keys, ", "))
		}
		names[i] = keys[at]
	}
	if !ok {
		return fail(r.Line, "no type; known are file, pipe, socket and filedescriptor")
	}
	action, ok := given["action"]
	if !ok {
		return fail(r.Line, "no action; for the type %s there are %s", r.Type, strings.Join(fdActions(r.Type), ", "))
	}
	r.Action = FDAction(strings.ToLower(action.value))
	if !slices.Contains(fdActions(r.Type), string(r.Action)) {
		return fail(action.line, "unknown action %q; for the type %s there are %s", action.value, r.Type, strings.Join(fdActions(r.Type), ", "))
	}
	for i, f := range fields {
		if err := r.set(names[i], f.value, budget); err != nil {
			return fail(f.line, "%s: %v", names[i], err)
		}
	}
	unix := r.LocalPath != "" || r.RemotePath != ""
	ip := r.LocalAddress+r.LocalPort+r.RemoteAddress+r.RemotePort != ""
	if unix && ip || unix && r.Family != "" && r.Family != FDUnix || ip && r.Family == FDUnix {
		return fail(r.Line, "no socket has both addresses or ports, which are of ip, and paths, which are of unix")
	}
	return r, nil
}

// set takes the value of one key, which the rule's type has.
func (r *FDRule) set(key, value string, budget *int) (err error) {
	switch key {
	case "warn":
		r.Warn, err = strconv.ParseBool(strings.ToLower(value))
		if err != nil {
			err = fmt.Errorf("unknown value %q; known are true and false", value)
		}
	case "listening":
		r.Listening = strings.ToLower(value)
		if r.Listening != "true" && r.Listening != "false" {
			err = fmt.Errorf("unknown value %q; known are true and false", value)
		}
	case "family":
		r.Family, err = fdFamily(value)
	case "path":
		r.Path = value
		r.path, err = globPattern(value, budget)
	case "localPath":
		r.LocalPath = value
		r.localPath, err = globPattern(value, budget)
	case "remotePath":
		r.RemotePath = value
		r.remotePath, err = globPattern(value, budget)
	case "regex":
		r.Regex = value
		r.regex, err = pattern(value, budget)
	case "localAddress":
		r.LocalAddress, err = value, checkFDAddress(value)
	case "remoteAddress":
		r.RemoteAddress, err = value, checkFDAddress(value)
	case "localPort":
		r.LocalPort, err = fdPort(value)
	case "remotePort":
		r.RemotePort, err = fdPort(value)
	case "value":
		n, perr := strconv.ParseUint(value, 10, 31)
		if perr != nil {
			return fmt.Errorf("%q is not the number of a descriptor", value)
		}
		r.Value = int(n)
	}
	return err
}

func fdFamily(value string) (FDFamily, error) {
	switch strings.ToLower(value) {
	case "ipv4", "inet4":
		return FDIPv4, nil
	case "ipv6", "inet6":
		return FDIPv6, nil
	case "ip", "inet":
		return FDIP, nil
	case "unix":
		return FDUnix, nil
	}
	return "", fmt.Errorf("unknown family %q; known are ipv4 (inet4), ipv6 (inet6), ip (inet) and unix", value)
}

func checkFDAddress(value string) error {
	if _, err := netip.ParseAddr(value); value != "*" && err != nil {
		return fmt.Errorf("%q is neither an IP address nor *; names of hosts are not looked up", value)
	}
	return nil
}

func fdPort(value string) (string, error) {
	if value == "*" {
		return value, nil
	}
	n, err := strconv.ParseUint(value, 10, 16)
	if err != nil {
		return "", fmt.Errorf("%q is neither a port, 0 to 65535, nor *", value)
	}
	return strconv.FormatUint(n, 10), nil
}

// pattern compiles a regular expression that has to match the whole.
func pattern(expr string, budget *int) (*regexp.Regexp, error) {
	tree, err := syntax.Parse(expr, syntax.Perl|syntax.DotNL)
	if err != nil {
		return nil, fmt.Errorf("%w (the syntax is RE2's, without lookaround and back references)", err)
	}
	prog, err := syntax.Compile(tree.Simplify())
	if err != nil {
		return nil, err
	}
	if *budget -= len(prog.Inst); *budget < 0 {
		return nil, errors.New("the patterns of this policy are too large together; make them simpler")
	}
	return regexp.Compile(`(?s)\A(?:` + expr + `)\z`)
}

// globPattern compiles a glob in the syntax of java.nio.file.FileSystem's
// getPathMatcher: * and ? stay within one name of a path and ** does not, [a-c]
// and [!a-c] are one character of the name, {a,b} is either, \ takes the meaning
// off the next character.
func globPattern(glob string, budget *int) (*regexp.Regexp, error) {
	var b strings.Builder
	group := false
	runes := []rune(glob)
	for i := 0; i < len(runes); i++ {
		switch c := runes[i]; {
		case c == '*' && i+1 < len(runes) && runes[i+1] == '*':
			b.WriteString(".*")
			i++
		case c == '*':
			b.WriteString("[^/]*")
		case c == '?':
			b.WriteString("[^/]")
		case c == '[':
			end := bracketEnd(runes, i)
			if end < 0 {
				return nil, fmt.Errorf("glob %q: no ] for its [", glob)
			}
			set, err := bracket(runes[i+1 : end])
			if err != nil {
				return nil, fmt.Errorf("glob %q: %w", glob, err)
			}
			b.WriteString(set)
			i = end
		case c == '{' && group:
			return nil, fmt.Errorf("glob %q: { within { }", glob)
		case c == '{':
			group = true
			b.WriteString("(?:")
		case c == '}' && group:
			group = false
			b.WriteString(")")
		case c == ',' && group:
			b.WriteString("|")
		case c == '\\':
			if i++; i == len(runes) {
				return nil, fmt.Errorf("glob %q: nothing after its last \\", glob)
			}
			b.WriteString(regexp.QuoteMeta(string(runes[i])))
		default:
			b.WriteString(regexp.QuoteMeta(string(c)))
		}
	}
	if group {
		return nil, fmt.Errorf("glob %q: no } for its {", glob)
	}
	return pattern(b.String(), budget)
}

// bracketEnd finds the ] that ends the set that begins at open. One directly
// after the beginning belongs to the set.
func bracketEnd(glob []rune, open int) int {
	from := open + 1
	if from < len(glob) && glob[from] == '!' {
		from++
	}
	for i := from + 1; i < len(glob); i++ {
		if glob[i] == ']' {
			return i
		}
	}
	return -1
}

// bracket translates what stands between [ and ]. No set holds a slash.
func bracket(set []rune) (string, error) {
	var b strings.Builder
	b.WriteString("[")
	if len(set) > 0 && set[0] == '!' {
		b.WriteString("^/")
		set = set[1:]
	}
	for i, c := range set {
		switch {
		case c == '/':
			return "", errors.New("a set of characters cannot hold /")
		case c == '-' && i > 0 && i < len(set)-1:
			b.WriteByte('-')
		default:
			fmt.Fprintf(&b, `\x{%x}`, c)
		}
	}
	b.WriteString("]")
	return b.String(), nil
}

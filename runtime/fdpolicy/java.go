package fdpolicy

import (
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/oci"
)

// policyProperty names, to a JVM with CRaC of its own, the file with its rules.
const policyProperty = "-Djdk.crac.resource-policies="

// For reads the policy of a container: what the option fd-policy says, or else,
// where the option java brings the Java library, the file that the options of the
// JVM name. rootfs is the container's root file system.
func For(o oci.Options, p *specs.Process, rootfs string) (oci.FDPolicy, error) {
	option := o.FDPolicy
	if option == "" && o.BringsJava() && p != nil {
		if file := javaPolicy(p, rootfs); file != "" {
			option = "file:" + file // as the option would name it
		}
	}
	return Load(option, rootfs)
}

// javaPolicy is the file that a JVM with CRaC of its own would take its rules from;
// empty if none is named. The last option counts.
func javaPolicy(p *specs.Process, rootfs string) (file string) {
	for _, o := range jvmOptions(p, rootfs) {
		if v, ok := strings.CutPrefix(o, policyProperty); ok {
			file = v
		}
	}
	if file != "" && !path.IsAbs(file) {
		file = path.Join(p.Cwd, file)
	}
	return file
}

// jvmOptions are the options of a JVM that a process is, or starts, in the order in
// which it reads them.
func jvmOptions(p *specs.Process, rootfs string) []string {
	env := func(name string) []string {
		for _, e := range slices.Backward(p.Env) {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				return quotedWords(v)
			}
		}
		return nil
	}
	l := launcher{read: func(name string) string {
		if !path.IsAbs(name) {
			name = path.Join(p.Cwd, name)
		}
		data, _ := readInside(rootfs, name) // without it there is no JVM, or it is on a volume
		return string(data)
	}}
	for _, word := range env("JDK_JAVA_OPTIONS") {
		l.word(word)
	}
	if len(p.Args) > 0 && path.Base(p.Args[0]) == "java" {
		for _, word := range p.Args[1:] {
			l.word(word)
		}
	}
	return slices.Concat(env("JAVA_TOOL_OPTIONS"), l.options, env("_JAVA_OPTIONS"))
}

// launcher reads a command line as the program java does: options up to the main
// class or jar, and those in files named by @.
type launcher struct {
	read    func(name string) string
	options []string

	value   bool // the next word is an option's value
	program bool // what comes now is the program's
	noFiles bool // @ has no meaning any more
}

// withValue are the options whose value is the next word.
var withValue = []string{
	"-cp", "-classpath", "--class-path", "-p", "--module-path", "--upgrade-module-path", "--add-modules",
	"--limit-modules", "--enable-native-access", "--add-exports", "--add-opens", "--add-reads", "--patch-module",
	"-d", "--describe-module", "--source",
}

func (l *launcher) word(word string) {
	file, ok := strings.CutPrefix(word, "@")
	switch {
	case l.program || l.noFiles || !ok || file == "":
		l.option(word)
	case file[0] == '@': // stands for itself
		l.option(file)
	default:
		for _, word := range argumentFile(l.read(file)) {
			l.option(word)
		}
	}
}

func (l *launcher) option(word string) {
	switch {
	case l.program:
	case l.value && !strings.HasPrefix(word, "-"):
		l.value = false
	case !strings.HasPrefix(word, "-"):
		l.program = true
	default:
		l.value = slices.Contains(withValue, word)
		l.noFiles = l.noFiles || word == "--disable-@files"
		l.program = strings.HasPrefix(word, "--module=")
		l.options = append(l.options, word)
	}
}

func isSpace(c byte) bool { return strings.IndexByte(" \t\n\v\f\r", c) >= 0 }

// quotedWords splits a variable as a JVM does: at white space that is not between
// quotes, which are left out.
func quotedWords(text string) (words []string) {
	var word []byte
	var quote byte
	within := false
	for _, c := range []byte(text) {
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word = append(word, c)
		case isSpace(c):
			if within {
				words = append(words, string(word))
			}
			word, within = nil, false
		case c == '"' || c == '\'':
			quote, within = c, true
		default:
			word, within = append(word, c), true
		}
	}
	if within {
		words = append(words, string(word))
	}
	return words
}

// argumentFile splits what is in a file that @ names: it has comments as well, and
// between quotes escapes and lines that go on.
func argumentFile(text string) (words []string) {
	var word []byte
	var quote byte
	within := false
	end := func() {
		if within {
			words = append(words, string(word))
		}
		word, quote, within = nil, 0, false
	}
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c == '\n' || c == '\r':
			end()
		case quote != 0 && c == '\\' && i+1 < len(text):
			i++
			switch c = text[i]; c {
			case '\n', '\r':
				for i+1 < len(text) && isSpace(text[i+1]) {
					i++
				}
				continue
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 't':
				c = '\t'
			case 'f':
				c = '\f'
			}
			word = append(word, c)
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word = append(word, c)
		case isSpace(c):
			end()
		case c == '#':
			end()
			for i+1 < len(text) && text[i+1] != '\n' && text[i+1] != '\r' {
				i++
			}
		case c == '"' || c == '\'':
			quote, within = c, true
		default:
			word, within = append(word, c), true
		}
	}
	end()
	return words
}

package docs

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sallyport/config"
	"sallyport/gateway/manifest"
	"sallyport/tests/harness"
)

const (
	reference = "docs/configuration.md"
	// UpdateVariable writes the reference instead of comparing it.
	updateVariable = "SALLYPORT_TEST_UPDATE"
)

const preamble = `# Configuration

Sallyport is configured by environment variables only. Unknown ` + "`SALLYPORT_`" + ` variables, values that do not parse and settings that are not supported yet refuse to start (exit code 2) and are named. Every program knows the variables
of every role, so that one environment file serves all. ` + "`sallyport config check`" + ` says what is set, from where, and what it opens.

Lists of addresses and globs are separated by ` + "`;`" + `, tags by ` + "`,`" + `. Durations take s, m, h, d and w. A value that is a secret comes from a file.

This page is made from the structs in ` + "`config/`" + `: ` + "`SALLYPORT_TEST_UPDATE=1 go test ./tests/docs`" + ` writes it again.

`

// page is one Markdown file.
type page struct {
	name string // relative to the repository
	text string
}

func pages(t *testing.T) []page {
	t.Helper()
	root := repository(t)
	names, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	names = append(names, filepath.Join(root, "README.md"))
	var all []page
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, page{rel, string(b)})
	}
	if len(all) < 5 {
		t.Fatalf("only %d pages found", len(all))
	}
	return all
}

func repository(t *testing.T) string {
	t.Helper()
	root, err := harness.Repository()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// blocks returns the fenced blocks of a language.
func (p page) blocks(language string) []string {
	var all []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(p.text, -1) {
		all = append(all, m[1])
	}
	return all
}

func TestConfigurationReference(t *testing.T) {
	path := filepath.Join(repository(t), reference)
	want := preamble + config.Reference()
	if os.Getenv(updateVariable) == "1" {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what the structs say: run %s=1 go test ./tests/docs", reference, updateVariable)
	}
}

func TestVariablesAreKnown(t *testing.T) {
	known := config.Names()
	seen := 0
	for _, p := range pages(t) {
		for _, name := range regexp.MustCompile(`SALLYPORT_[A-Z0-9_]*[A-Z0-9]`).FindAllString(p.text, -1) {
			if name == updateVariable {
				continue
			}
			seen++
			if !slices.Contains(known, name) {
				t.Errorf("%s: no variable %s", p.name, name)
			}
		}
	}
	if seen == 0 {
		t.Error("no variable is mentioned anywhere")
	}
}

func TestLinks(t *testing.T) {
	root := repository(t)
	for _, p := range pages(t) {
		for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(p.text, -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(p.name), target)); err != nil {
				t.Errorf("%s: link to %s: %v", p.name, m[1], err)
			}
		}
	}
}

func TestDocumentsParse(t *testing.T) {
	seen := 0
	check := func(where, text string) {
		seen++
		var set manifest.Set
		if err := set.Parse(where, []byte(text)); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	for _, p := range pages(t) {
		for _, block := range p.blocks("yaml") {
			check(p.name, block)
		}
		for _, block := range p.blocks("sh") {
			for _, m := range regexp.MustCompile(`(?ms)<<'YAML'\n(.*?)^YAML$`).FindAllStringSubmatch(block, -1) {
				check(p.name, m[1])
			}
		}
	}
	if seen == 0 {
		t.Error("no document stands anywhere")
	}
}

// commandLine is one use of our programs in a page.
type commandLine struct {
	page, line, program string
	args                []string
}

// commandLines finds the commands in sh blocks and in inline code that begins
// with a program's name.
func commandLines(p page) []commandLine {
	var all []commandLine
	add := func(line string) {
		fields := strings.Fields(line)
		for len(fields) > 0 && strings.Contains(fields[0], "=") {
			fields = fields[1:]
		}
		if len(fields) > 0 && slices.Contains([]string{"sallyport", "sallyport-rcp", "sallyport-node"}, fields[0]) {
			all = append(all, commandLine{p.name, line, fields[0], fields[1:]})
		}
	}
	for _, block := range p.blocks("sh") {
		lines := bufio.NewScanner(strings.NewReader(block))
		for lines.Scan() {
			add(strings.TrimPrefix(lines.Text(), "go run ./cmd/"))
		}
	}
	for _, m := range regexp.MustCompile("`(sallyport[^`]*)`").FindAllStringSubmatch(p.text, -1) {
		add(m[1])
	}
	return all
}

// words are the arguments up to the first that is no command word.
func (c commandLine) words() []string {
	var words []string
	for _, a := range c.args {
		if !regexp.MustCompile(`^[a-z][a-z-]*$`).MatchString(a) {
			break
		}
		words = append(words, a)
	}
	return words
}

// flags are the long flags before "--".
func (c commandLine) flags() []string {
	var flags []string
	for _, a := range c.args {
		if a == "--" {
			break
		}
		if strings.HasPrefix(a, "--") {
			name, _, _ := strings.Cut(a, "=")
			flags = append(flags, name)
		}
	}
	return flags
}

// TestCommandsExist asks each command for its help: the command and its flags
// stand there.
func TestCommandsExist(t *testing.T) {
	site := harness.New(t)
	help := make(map[string]string)
	ask := func(program string, words []string) string {
		key := program + " " + strings.Join(words, " ")
		if text, ok := help[key]; ok {
			return text
		}
		out, err := exec.CommandContext(t.Context(), site.Program(program), append(slices.Clone(words), "--help")...).CombinedOutput()
		text := string(out)
		if err != nil {
			text = ""
		}
		help[key] = text
		return text
	}
	seen := 0
	for _, p := range pages(t) {
		for _, c := range commandLines(p) {
			seen++
			words := c.words()
			// The last words may be arguments (local event send TEXT): the
			// usage line shows where the command ends.
			text := ask(c.program, words)
			usage := regexp.MustCompile(`(?m)^\s+(sallyport[^\n]*)$`).FindStringSubmatch(text)
			if usage == nil {
				t.Errorf("%s: %q: no such command", c.page, c.line)
				continue
			}
			if len(words) > 0 && !strings.Contains(usage[1], " "+words[0]) {
				t.Errorf("%s: %q: %q is no command", c.page, c.line, words[0])
			}
			if noun := ask(c.program, words[:min(1, len(words))]); len(words) > 1 && strings.Contains(noun, "Available Commands") && !strings.Contains(usage[1], " "+words[1]) {
				t.Errorf("%s: %q: %q is no verb of %s", c.page, c.line, words[1], words[0])
			}
			for _, flag := range c.flags() {
				if !regexp.MustCompile(regexp.QuoteMeta(flag) + `\b`).MatchString(text) {
					t.Errorf("%s: %q: no flag %s", c.page, c.line, flag)
				}
			}
		}
	}
	if seen < 20 {
		t.Errorf("only %d commands were found in the pages", seen)
	}
}

// TestUnits shows that the units of docs/services are in the page, that systemd
// takes each line of them, and that what they start and set exists.
func TestUnits(t *testing.T) {
	site := harness.New(t)
	units, err := filepath.Glob(filepath.Join(repository(t), "docs", "services", "*.service"))
	if err != nil || len(units) == 0 {
		t.Fatalf("no units: %v", err)
	}
	index := slices.IndexFunc(pages(t), func(p page) bool { return p.name == "docs/services.md" })
	if index < 0 {
		t.Fatal("no page tells of the units")
	}
	told, known := pages(t)[index].text, config.Names()
	analyze := harness.Tool(t, "systemd-analyze")
	for _, name := range units {
		base := filepath.Base(name)
		if !strings.Contains(told, "(services/"+base+")") {
			t.Errorf("no link to %s", base)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		unit := string(b)
		for _, m := range regexp.MustCompile(`(?m)^Environment=(\w+)=`).FindAllStringSubmatch(unit, -1) {
			if !slices.Contains(known, m[1]) {
				t.Errorf("%s: no variable %s", base, m[1])
			}
		}
		// Go ends with 2 as well, when a program panics or runs out of memory.
		if !strings.Contains(unit, "\nRestart=always\n") || !strings.Contains(unit, "\nRestartPreventExitStatus=4\n") || !strings.Contains(unit, "\nLimitCORE=0\n") {
			t.Errorf("%s is not started again after each end but 4, or leaves cores", base)
		}
		started := regexp.MustCompile(`(?m)^ExecStart=/usr/bin/(\S+)(.*)$`).FindStringSubmatch(unit)
		if started == nil {
			t.Errorf("%s starts nothing of ours", base)
			continue
		}
		program := site.Program(started[1])
		if role := strings.Fields(started[2]); len(role) > 0 {
			out, _ := exec.CommandContext(t.Context(), program, role[0], "no-role").CombinedOutput() // the refusal names those that there are
			if len(role) != 2 || !strings.Contains(string(out), role[1]) {
				t.Errorf("%s starts %q: %s", base, started[0], out)
			}
		}
		// systemd asks for the program, which is not installed here.
		here := filepath.Join(t.TempDir(), base)
		if err := os.WriteFile(here, []byte(strings.Replace(unit, "/usr/bin/"+started[1], program, 1)), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", here).CombinedOutput(); err != nil || strings.Contains(string(out), here) || strings.Contains(string(out), base+":") {
			t.Errorf("%s: %v\n%s", base, err, out)
		}
	}
}

// TestCommandLines shows that commands, words and flags are found.
func TestCommandLines(t *testing.T) {
	p := page{"x.md", "Say `sallyport node list --state down`.\n\n```sh\nexport A=b\ngo run ./cmd/sallyport demo\nsallyport action run --node web-1 -- sh -c 'a --b'\n```\n"}
	var got bytes.Buffer
	for _, c := range commandLines(p) {
		got.WriteString(strings.Join(c.words(), " ") + "|" + strings.Join(c.flags(), " ") + "\n")
	}
	want := "demo|\naction run|--node\nnode list|--state\n"
	if got.String() != want {
		t.Errorf("found %q, want %q", got.String(), want)
	}
}

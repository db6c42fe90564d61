package manifest

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

const contract = `kind: policy
name: disk-root
type: check
spec:
  command: [/usr/lib/nagios/plugins/check_disk, -w, 10%, -c, 5%, -p, /]
  interval: 30s
---
kind: deployment
name: base
selector: role=web
policies: [disk-root]
rollout: {max_parallel: 10%, max_failures: 0}
`

func TestContract(t *testing.T) {
	var s Set
	if err := s.Parse("a.yaml", []byte(contract)); err != nil {
		t.Fatal(err)
	}
	want := `{"command":["/usr/lib/nagios/plugins/check_disk","-w","10%","-c","5%","-p","/"],"interval":"30s"}`
	if p := s.Policies[0]; p.Name != "disk-root" || p.Type != "check" || string(p.Spec) != want {
		t.Errorf("%+v: %s", p, p.Spec)
	}
	d := s.Deployments[0]
	if d.Name != "base" || d.Selector != "role=web" || len(d.Policies) != 1 || d.Rollout.MaxParallel != "10%" || d.Pos.String() != "a.yaml:8" {
		t.Errorf("%+v", d)
	}
}

func TestOnePolicyHasOneForm(t *testing.T) {
	forms := []string{
		"kind: policy\nname: m\ntype: files\nspec:\n  files: [{path: /etc/motd, content: \"hi\\n\", mode: 0644}]\n",
		"---\n# the same\nname: m\nkind: policy\nspec:\n  files:\n  - mode: \"644\"\n    path: /etc/motd\n    content: |\n      hi\ntype: files\n...\n",
		"kind: policy\nname: m\ntype: files\nspec:\n  files: [{path: /etc/motd, content: \"hi\\n\"}]\n",
	}
	var first string
	for _, text := range forms {
		var s Set
		if err := s.Parse("f", []byte(text)); err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = string(s.Policies[0].Spec)
		}
		if got := string(s.Policies[0].Spec); got != first || !json.Valid([]byte(got)) {
			t.Errorf("%s; want %s", got, first)
		}
	}
}

func TestFaultsNameFileAndLine(t *testing.T) {
	check := "kind: policy\nname: p\ntype: check\nspec:\n"
	files := "kind: policy\nname: p\ntype: files\nspec:\n"
	target := "kind: policy\nname: p\ntype: target\nspec:\n"
	for name, c := range map[string]struct{ text, want string }{
		"type":            {"kind: policy\nname: p\ntype: chekc\nspec: {}\n", `bad.yaml:3: unknown policy type "chekc"`},
		"later type":      {"kind: policy\nname: p\ntype: logfile\nspec: {}\n", `bad.yaml:3: policy type "logfile" is not supported yet`},
		"kind":            {"kind: plicy\nname: p\n", `bad.yaml:1: unknown kind "plicy"`},
		"no kind":         {"name: p\n", `bad.yaml:1: document has no kind`},
		"key":             {"kind: policy\nname: p\ntype: check\nintervall: 3s\nspec: {command: [a]}\n", `bad.yaml:4: unknown key "intervall" in policy`},
		"spec key":        {check + "  comand: [x]\n", `bad.yaml:5: unknown key "comand" in check spec`},
		"missing":         {check + "  interval: 3s\n", `bad.yaml:5: check spec has no command`},
		"no spec":         {"kind: policy\nname: p\ntype: check\n", `bad.yaml:1: policy has no spec`},
		"no command":      {check + "  command: []\n", `bad.yaml:5: spec.command: a program is needed`},
		"interval":        {check + "  command: [x]\n  interval: 30\n", `bad.yaml:6: interval: "30" is not a duration`},
		"short":           {check + "  command: [x]\n  interval: 5ms\n", `bad.yaml:6: spec.interval: 5ms is shorter than 1s`},
		"twice":           {check + "  command: [x]\n  command: [y]\n", `bad.yaml:6: key "command" stands twice`},
		"not a list":      {check + "  command: x y\n", `bad.yaml:5: command: want a list, not a single value`},
		"null":            {check + "  command: [~]\n", `bad.yaml:5: want text, not nothing`},
		"path":            {files + "  files:\n  - path: a/b\n    content: x\n", `bad.yaml:6: spec.files[0].path: "a/b"`},
		"mode":            {files + "  files:\n  - path: /a\n    content: x\n    mode: 7777\n", `bad.yaml:8: spec.files[0].mode`},
		"file key":        {files + "  files:\n  - path: /a\n    contents: x\n", `bad.yaml:7: unknown key "contents" in file`},
		"target key":      {target + "  where: a:1\n", `bad.yaml:5: unknown key "where" in target spec`},
		"target address":  {target + "  address: db\n", `bad.yaml:5: spec.address: "db" is not host:port`},
		"target url":      {target + "\n  url: ftp://a\n", `bad.yaml:6: spec.url: scheme "ftp"`},
		"target secret":   {target + "  url: http://u:p@a\n", `bad.yaml:5: spec.url: it holds credentials`},
		"target both":     {target + "  address: a:1\n  url: http://a\n", `bad.yaml:6: spec.url: an address and a url`},
		"target neither":  {"kind: policy\nname: p\ntype: target\nspec: {}\n", `bad.yaml:4: spec.address: either`},
		"target timeout":  {target + "  address: a:1\n  timeout: 3s\n", `bad.yaml:6: spec.timeout: only`},
		"target port":     {target + "  address: a:70000\n", `bad.yaml:5: spec.address: "70000" is not a port`},
		"built in":        {"kind: policy\nname: ping\ntype: target\nspec: {address: 'a:1'}\n", `bad.yaml:1: every node has a target "ping"`},
		"syntax":          {"kind: policy\nname: [\n", `bad.yaml:`},
		"tab":             {"kind: policy\n\tname: x\n", `bad.yaml:2: not YAML`},
		"list":            {"- a\n", `bad.yaml:1: a document is a mapping`},
		"second document": {contract + "---\nkind: policy\nname: x\ntype: chekc\nspec: {}\n", `bad.yaml:16: unknown policy type`},
		"same name":       {contract + "---\nkind: deployment\nname: base\nselector: a\npolicies: []\n", `bad.yaml:14: deployment "base" stands at bad.yaml:8 already`},
		"selector":        {"kind: deployment\nname: d\nselector: ''\npolicies: [p]\n", `bad.yaml:3: empty selector`},
		"bad selector":    {"kind: deployment\nname: d\nselector: a b\npolicies: [p]\n", `bad.yaml:3: selector "a b"`},
		"max":             {"kind: deployment\nname: d\nselector: a\npolicies: [p]\nmin: 3\nmax: 2\n", `bad.yaml:6: max 2 is below min 3`},
		"negative":        {"kind: deployment\nname: d\nselector: a\npolicies: [p]\nmin: -1\n", `bad.yaml:5: "-1" is not a whole number`},
		"rollout":         {"kind: deployment\nname: d\nselector: a\npolicies: [p]\nrollout: {max_parallel: 0%}\n", `bad.yaml:5: max_parallel`},
		"name":            {"kind: deployment\nname: a/b\nselector: a\npolicies: [p]\n", `bad.yaml:2: name "a/b"`},
	} {
		s := Set{}
		err := s.Parse("bad.yaml", []byte(c.text))
		var errs Errors
		if !errors.As(err, &errs) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %s", name, err, c.want)
		}
		if len(s.Policies)+len(s.Deployments) > 0 {
			t.Errorf("%s: something was added", name)
		}
	}
}

func TestTarget(t *testing.T) {
	var s Set
	text := "kind: policy\nname: db\ntype: target\nspec: {address: 'db:5432'}\n---\nkind: policy\nname: web\ntype: target\nspec: {url: 'https://web/x', timeout: 90s}\n"
	if err := s.Parse("t.yaml", []byte(text)); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{`{"address":"db:5432"}`, `{"url":"https://web/x","timeout":"1m30s"}`} {
		if got := string(s.Policies[i].Spec); got != want {
			t.Errorf("%s; want %s", got, want)
		}
	}
}

func TestSeveralFiles(t *testing.T) {
	var s Set
	if err := s.Parse("a.yaml", []byte(contract)); err != nil {
		t.Fatal(err)
	}
	if err := s.Parse("b.yaml", []byte(contract)); err == nil || !strings.Contains(err.Error(), `b.yaml:1: policy "disk-root" stands at a.yaml:1 already`) {
		t.Errorf("%v", err)
	}
	if err := s.Parse("empty.yaml", []byte("---\n# nothing\n---\n")); err != nil || len(s.Policies) != 1 {
		t.Errorf("%v, %d policies", err, len(s.Policies))
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(contract))
	f.Add([]byte("kind: policy\nname: m\ntype: files\nspec: &a\n  files: [{path: /etc/motd, content: \"hi\\n\", mode: 0644}]\n---\n*a\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var s Set
		if err := s.Parse("f", text); err != nil {
			var errs Errors
			if !errors.As(err, &errs) || len(errs) == 0 || len(errs) > maxErrors {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		for _, p := range s.Policies {
			if !json.Valid(p.Spec) || p.Name == "" {
				t.Fatalf("%+v", p)
			}
		}
	})
}

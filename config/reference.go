package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Field is one variable, as the structs describe it.
type Field struct {
	Name    string   // the variable
	Roles   []string // who reads it; empty: everybody
	Form    string   // what is accepted
	Default string   // empty: none, or computed
	Doc     string
	Why     string // why the default is what it is

	goName string
	typ    reflect.Type
}

// groups are the role structs in the order of the reference.
func groups() []struct {
	role string
	v    validator
} {
	return []struct {
		role string
		v    validator
	}{
		{"gateway", &Gateway{}}, {"rcp", &RCP{}}, {"node", &Node{}}, {"pki", &PKI{}}, {"signer", &Signer{}}, {"operator", &Operator{}},
	}
}

// Fields returns every variable of every role: the common ones first.
func Fields() []Field {
	var out []Field
	for i, g := range groups() {
		for _, f := range fieldsOf(g.v) {
			if isCommon(f.Name) {
				if i == 0 {
					out = append(out, f)
				}
				continue
			}
			f.Roles = []string{g.role}
			out = append(out, f)
		}
	}
	return out
}

// Names returns the names of all variables, sorted.
func Names() []string {
	var names []string
	for _, f := range Fields() {
		names = append(names, f.Name)
	}
	slices.Sort(names)
	return names
}

func isCommon(name string) bool {
	_, ok := reflect.TypeFor[Common]().FieldByNameFunc(func(n string) bool {
		f, _ := reflect.TypeFor[Common]().FieldByName(n)
		return f.Tag.Get("env") == name
	})
	return ok
}

// fieldsOf reads the tags of one role struct.
func fieldsOf(v validator) []Field {
	var out []Field
	for _, f := range reflect.VisibleFields(reflect.TypeOf(v).Elem()) {
		name := f.Tag.Get("env")
		if name == "" {
			continue
		}
		out = append(out, Field{
			Name: name, Form: f.Tag.Get("form"), Default: f.Tag.Get("envDefault"),
			Doc: f.Tag.Get("doc"), Why: f.Tag.Get("why"), goName: f.Name, typ: f.Type,
		})
	}
	return out
}

// Reference returns the table of all variables in Markdown.
func Reference() string {
	var b strings.Builder
	titles := map[string]string{
		"": "Every role", "gateway": "Gateway (`sallyport run gateway`)", "rcp": "RCP (`sallyport run rcp`, `sallyport-rcp`)",
		"node": "Node (`sallyport run node`, `sallyport-node`)", "pki": "CA (in the gateway, or `sallyport run pki`)", "signer": "Signer (`sallyport run signer`)", "operator": "Operators",
	}
	cell := strings.NewReplacer("|", `\|`, "*", `\*`)
	last := "-"
	for _, f := range Fields() {
		role := strings.Join(f.Roles, ", ")
		if role != last {
			if last != "-" {
				b.WriteByte('\n')
			}
			fmt.Fprintf(&b, "## %s\n\n| variable | form | default | what it does | why this default |\n|---|---|---|---|---|\n", titles[role])
			last = role
		}
		def := "`" + f.Default + "`"
		if f.Default == "" {
			def = ""
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", f.Name, cell.Replace(f.Form), def, cell.Replace(f.Doc), cell.Replace(f.Why))
	}
	return b.String()
}

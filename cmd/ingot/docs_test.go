package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/doctor"
	"ingot/internal/inspect"
)

// TestJSONDocs reads each example of docs/json.md into the type that prints it,
// and back: neither may have a key that the other lacks.
func TestJSONDocs(t *testing.T) {
	types := map[string]any{
		"ingot inspect":      &inspect.Report{},
		"ingot doctor":       &doctor.Report{},
		"ingot ps":           &[]vmView{},
		"ingot vm get":       &vmView{},
		"ingot lease list":   &[]leaseView{},
		"ingot lease show":   &leaseView{},
		"ingot nat list":     &natView{},
		"ingot port list":    &[]portView{},
		"ingot vm egress":    &egressView{},
		"ingot vpn list":     &[]peerView{},
		"ingot machine list": &[]machineView{},
		"ingot image list":   &[]imageRow{},
		"ingot version":      &build{},
	}
	page, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, section := range strings.Split(string(page), "\n## ")[1:] {
		name, body, _ := strings.Cut(section, "\n")
		v, ok := types[name]
		if !ok {
			t.Errorf("%s: this test does not know its type", name)
			continue
		}
		delete(types, name)
		m := regexp.MustCompile("(?s)```json\n(.*?)```").FindStringSubmatch(body)
		if m == nil {
			t.Errorf("%s has no example", name)
			continue
		}
		d := json.NewDecoder(bytes.NewReader([]byte(m[1])))
		d.DisallowUnknownFields()
		if err := d.Decode(v); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		printed, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(generic(t, []byte(m[1])), generic(t, printed)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	for name := range types {
		t.Errorf("docs/json.md does not have %s", name)
	}
}

// TestFlintlockDocs: each test that docs/flintlock.md names is there.
func TestFlintlockDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/flintlock.md")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("grep", "-rhoE", "--include=*_test.go", "^func (Test|Fuzz)[A-Za-z0-9]+\\(", "../..").Output()
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)(…?)`").FindAllStringSubmatch(string(page), -1)
	if len(named) == 0 {
		t.Error("it names no test")
	}
	for _, m := range named {
		end := map[string]string{"": "("}[m[2]] // with an ellipsis, it is the beginning of some
		if !strings.Contains(string(out), "func "+m[1]+end) {
			t.Errorf("there is no %s%s", m[1], m[2])
		}
	}
}

func generic(t *testing.T, data []byte) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestYAMLHasTheKeysOfJSON(t *testing.T) {
	var b strings.Builder
	yaml := asYAML
	v := natView{Inside: "bond0.1000", Outside: "bond0", Rules: []ruleView{{Rule: "a: b", InForce: true}}}
	if err := yaml.write(&b, v, nil); err != nil {
		t.Fatal(err)
	}
	const want = "inside: bond0.1000\noutside: bond0\nforwarding: false\nrules:\n- rule: \"a: b\"\n  in_force: true\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

package doctor_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ingot/internal/doctor"
	"ingot/internal/need"
)

// A container's memory is what its control group leaves it; its files are as
// cgroup v2 shows them, which not every machine that tests run on has.
func TestMemory(t *testing.T) {
	needs(t)
	need.CGroup2(t)
	const groups = "/sys/fs/cgroup"
	mount(t, "tmpfs", groups, "tmpfs", 0, "")
	show := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(groups, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := doctor.Patient{Device: "ingot-nosuch"}
	show("memory.max", "524288000\n")
	show("memory.current", "314572800\n")
	show("memory.stat", "anon 209715200\nfile 104857600\nkernel 1\n")
	expect(t, "memory", p, doctor.Fail, "only 300 MiB are available") // the cache can go
	show("memory.max", "1258291200\n")
	expect(t, "memory", p, doctor.Warn, "only 1000 MiB are available")
	show("memory.max", "max\n")
	if f := look(t, "memory", p); strings.Contains(f.Detail, "1000 MiB") {
		t.Errorf("%+v", f)
	}
}

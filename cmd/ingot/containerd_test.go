package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestContainerdConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte("root: /srv/containerd\nvolume-size: 512\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := readContainerdConfig(file)
	if err != nil || c.Root != "/srv/containerd" || c.VolumeSize != 512 || c.State != defaultContainerdConfig().State {
		t.Errorf("got %+v, %v", c, err)
	}
	if err := os.WriteFile(file, []byte("rot: /srv/containerd\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readContainerdConfig(file); err == nil || !strings.Contains(err.Error(), "rot") {
		t.Errorf("an unknown key: %v", err)
	}
}

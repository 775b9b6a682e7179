package vm

import "testing"

func TestSelector(t *testing.T) {
	labels := map[string]string{"app": "web", "tier": "front", "empty": ""}
	for text, want := range map[string]bool{
		"":                        true,
		"app=web":                 true,
		"app==web":                true,
		" app = web , tier=front": true,
		"app=web,tier=back":       false,
		"app!=web":                false,
		"app!=db":                 true,
		"none!=x":                 true,
		"app":                     true,
		"none":                    false,
		"!none":                   true,
		"!app":                    false,
		"empty=":                  true,
		"none=":                   false,
	} {
		s, err := ParseSelector(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
		} else if got := s.Matches(labels); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	for _, text := range []string{",", "a=b,", "=x", "!", "a b", "a in (b)", "a=b=c", "a!=b!=c"} {
		if _, err := ParseSelector(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

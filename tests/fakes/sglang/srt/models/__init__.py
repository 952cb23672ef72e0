"""Where SGLang has its models; its presence tells an SGLang from another folder."""
